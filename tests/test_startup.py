"""Starting quickly: the collector rests while large packages are imported, and only then."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from types import ModuleType

import pytest

from course_lib.startup import without_collecting


def test_nothing_is_collected_inside_and_everything_as_before_after_it():
    assert gc.isenabled()
    with without_collecting():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0


def test_garbage_from_before_is_not_kept_for_ever():
    """A dropped model of a learner, whose parts hold each other, was frozen with the packages."""
    with without_collecting():
        pass
    garbage = ModuleType("garbage")
    garbage.itself = garbage
    gone = weakref.ref(garbage)
    del garbage
    with without_collecting():
        pass
    gc.collect()
    assert gone() is None


def test_a_stopped_engine_frees_its_model_whoever_holds_it():
    code = (
        "import gc, weakref; from course_lib import connect\n"
        "service = connect('embedded', quiet=True)\n"
        "sampler = service.create_sampling_client(base_model='course/base').result()\n"
        "from tinker import types\n"
        "prompt, params = types.ModelInput.from_ints([1, 2]), types.SamplingParams(max_tokens=2)\n"
        "sampler.sample(prompt, 1, params).result()\n"
        "client = service.create_lora_training_client(base_model='course/base').result()\n"
        "client.optim_step(types.AdamParams()).result()\n"
        "model = weakref.ref(service.engine.models['course/base'].base)\n"
        "service.engine.stop()\n"
        "assert model() is None\n"
        "assert 2 * gc.get_freeze_count() > len(gc.get_objects())\n"
        "service.engine.stop()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


def test_a_failing_import_turns_the_collector_on_again():
    with pytest.raises(ZeroDivisionError), without_collecting():
        _ = 1 / 0
    assert gc.isenabled()


def test_who_has_turned_the_collector_off_keeps_it_off():
    gc.disable()
    try:
        with without_collecting():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_connecting_leaves_the_packages_out_of_later_collections():
    code = (
        "import gc; from course_lib.client import connect\n"
        "frozen, tracked = gc.get_freeze_count(), len(gc.get_objects())\n"
        "assert gc.isenabled() and frozen > 5 * tracked, (frozen, tracked)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


def test_the_sdk_talks_on_a_fast_event_loop_and_other_loops_stay_as_they_are():
    code = (
        "import asyncio, sys; from course_lib import connect\n"
        "before = asyncio.get_event_loop_policy()\n"
        "service = connect('embedded', quiet=True)\n"
        "loop = service.holder.get_loop()\n"
        "assert type(loop).__module__.startswith('uvloop') or sys.platform == 'win32', loop\n"
        "assert asyncio.get_event_loop_policy() is before\n"
        "assert asyncio.run(asyncio.sleep(0, 7)) == 7\n"
        "service.close('success').result()\n"
        "try: service.holder\n"
        "except RuntimeError as error: assert 'closed' in str(error)\n"
        "else: raise AssertionError('a closed client connects')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


def test_an_interrupt_while_torch_is_imported_waits_until_it_is_there():
    """In a notebook torch stayed half imported: every later cell ended in "module functions cannot
    set METH_CLASS or METH_STATIC". A command still ends at once."""
    code = (
        "import signal, sys\n"
        "class Impatient:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch.version': signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Impatient())\n"
        "if sys.argv[1] == 'session': sys.ps1 = '>>> '\n"
        "try: from course_lib import connect\n"
        "except KeyboardInterrupt: print('interrupted,', 'tinker' in sys.modules)\n"
        "if sys.argv[1] == 'session': from course_lib import connect; import torch"
    )
    for kind, whole in (("session", True), ("command", False)):
        command = [sys.executable, "-c", code, kind]
        ended = subprocess.run(command, check=True, capture_output=True, text=True, timeout=100)
        assert ended.stdout == f"interrupted, {whole}\n"
