# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown] id="title"
# # 09 · Deploy: from a checkpoint to an endpoint
#
# A checkpoint is a file that only you can use. An endpoint is an address that others can call.
# Between the two lie a download, a sum, a proof, a server, and a key.
#
# After this notebook you can
#
# - say what is in a LoRA checkpoint, and what is not;
# - merge an adapter by hand, and write the test that a merge must pass;
# - recognise six wrong merges, and say which of them no test on your own machine finds;
# - say when bfloat16 swallows what you trained;
# - serve a model with a key, stream from it, and read how it behaves under load;
# - compare, test and roll back before somebody else has to ask you to.
#
# You need lesson 02; lesson 05 helps. This is one of the two longest lessons; a good place for a
# break is before "Serve it".

# %% [markdown] id="card"
# The builder writes the measured card here.

# %% id="connect"
from course_lib import connect, check, hint, progress, preset

service = connect()

# %% [markdown] id="candidates-note"
# ## What do we ship?
#
# The model of lesson 05, trained here again in a few seconds: SFT, then GRPO. Both are kept: the
# first will be version 1 of our service, the second version 2.

# %% id="settings"
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

MAX_TOKENS = 40  # per answer
HELDOUT = 40  # problems that the served model and the engine must answer alike
CALLS = 16  # chats at once
rl_config = replace(preset().rl, steps=15, prompts_per_step=8, save_every=0)
rl_config = replace(rl_config, learning_rate=1e-3, max_tokens=MAX_TOKENS)
place = Path(tempfile.mkdtemp())  # everything that this lesson writes; the last cell deletes it

# %% id="train"
from course_lib.environments import sums_environment
from course_lib.grpo import train_grpo
from course_lib.lessons import band, measured, quick_sft, quote

sft_client, tokenizer, _ = quick_sft(service, 100, seed=0)
sft_checkpoint = sft_client.save_state("sft").result().path
client = service.create_training_client_from_state(sft_checkpoint).result()
environment = sums_environment()
train_grpo(client, environment, rl_config, tokenizer=tokenizer, seed=0)
checkpoint = client.save_state("grpo").result().path

# %% [markdown] id="chat-note"
# Ask all three. In JupyterLab you can type your own question.

# %% id="chat"
from course_lib.widgets import Chat

models = {
    "base": service.create_sampling_client(base_model=service.base_model).result(),
    "SFT": sft_client.save_weights_and_get_sampling_client().result(),
    "GRPO": client.save_weights_and_get_sampling_client().result(),
}
Chat(models, tokenizer, "What is 23 + 45 + 61?").show()

# %% [markdown] id="checkpoint-question"
# ## What is a checkpoint made of?
#
# `checkpoint` is a name: `tinker://`, a run, a path. The weights lie with the service, also when
# the service is this very process. Let us fetch them through the SDK; the same call works with a
# hosted service.
#
# **Predict.** Is the base model in the download? Which matrices are?

# %% id="download"
from course_lib.export.download import download_adapter

download = download_adapter(service, checkpoint, place / "download")
for name in download.files:
    print(f"{name}: {(download.folder / name).stat().st_size / 1e6:.1f} MB")

# %% id="look-inside"
from course_lib.export.adapter import read_adapter
from course_lib.export.base import find_base

base = find_base(download.base_model, download.model_folder)
adapter = read_adapter(download.folder, base)
print(f"rank {adapter.config['r']}, alpha {adapter.config['lora_alpha']}")
print(f"{len(adapter.pairs)} pairs of matrices, for example")
for module in list(adapter.pairs)[:3]:
    pair = adapter.pairs[module]
    print(f"  {module}: A {tuple(pair.A.shape)}, B {tuple(pair.B.shape)}")

# %% [markdown] id="checkpoint-lesson"
# Two matrices for each adapted weight, the rank, alpha, and the *name* of the base: no more. Not
# the base model itself, not the tokenizer, not the chat template. Whoever gets only this file can
# do nothing with it, and whoever puts it on another base gets another model.
#
# How small is it? $r\,(d_{in}+d_{out})$ numbers stand for $d_{in}\,d_{out}$:

# %% id="checkpoint-size"
for d in (128, 1024, 4096):
    print(f"rank 16 on a {d} x {d} weight: {16 * 2 * d / d**2:.1%} of its size")

# %% [markdown] id="merge-question"
# ## What is a merge?
#
# While we trained, each adapted layer computed $W x + \frac{\alpha}{r} B(Ax)$: two paths. A server
# that knows nothing of LoRA has one matrix per layer. So we add once, and for good (Hu et al. 2021,
# "LoRA", section 4.1, [arXiv 2106.09685](https://arxiv.org/abs/2106.09685)):
#
# $$W' = W + \frac{\alpha}{r}\,B A$$
#
# **Write it**, with lists of rows.


# %% id="write-merge" exercise="09.1"
def merge(W, A, B, alpha):
    """W (d_out, d_in), A (r, d_in), B (d_out, r), lists of rows; gives the merged weight."""
    rank = len(A)
    change = [
        [sum(B_row[k] * A[k][column] for k in range(rank)) for column in range(len(A[0]))]
        for B_row in B
    ]
    return [
        [w + alpha / rank * c for w, c in zip(W_row, c_row, strict=True)]
        for W_row, c_row in zip(W, change, strict=True)
    ]


# %% id="check-merge"
merge = check("09.1", merge)

# %% [markdown] id="merge-probe-note"
# The library does the same with tensors. Put a vector through one real layer, both ways. The last
# line is wrong on purpose.

# %% id="merge-source"
from course_lib.export.merge import lora_delta
from course_lib.widgets import show, show_source

show_source(lora_delta)

# %% id="merge-probe"
import torch
from safetensors import safe_open

MODULE = "model.layers.1.self_attn.q_proj"
with safe_open(base.path / "model.safetensors", framework="pt") as file:
    W = file.get_tensor(f"{MODULE}.weight")
pair, alpha = adapter.pairs[MODULE], adapter.config["lora_alpha"]
x = torch.linspace(-1, 1, W.shape[1])
two_paths = W @ x + adapter.scaling * (pair.B @ (pair.A @ x))
merged = merge(W.tolist(), pair.A.tolist(), pair.B.tolist(), alpha)
one_path = torch.as_tensor(merged, dtype=torch.float32) @ x  # lists, an array or a tensor
forgot_the_rank = (W + alpha * pair.B @ pair.A) @ x
for name, y in {"merged": one_path, "without 1/r": forgot_the_rank}.items():
    band(f"{name} equals two paths", torch.allclose(y, two_paths, atol=1e-4))

# %% id="merge-figure"
from course_lib.plots.merge import matrices_figure

change = lora_delta(pair, adapter)
corner = {"W": W, "change": change, "10 x change": 10 * change, "W + change": W + change}
corner = {name: matrix[:48, :48].tolist() for name, matrix in corner.items()}
show(matrices_figure(corner, "A corner of one weight, its change, and their sum"))
measured("size of the change beside the weight", (change.norm() / W.norm()).item(), "%")

# %% [markdown] id="wrong-question"
# ## When is a merge wrong?
#
# A sum can go wrong quietly. Every merge below runs, loads, and answers. One is right:
#
# - **merged**: as above;
# - **alpha, not alpha/r**: the change is 16 times too large;
# - **no scale**: $\alpha/r$ forgotten, so the change is half as large as it should be;
# - **transposed**: $(BA)^\top$ on the square weights, where no shape complains;
# - **one layer missing**: one pair of 29 forgotten;
# - **tied embedding**: the output layer's change also lands on the embedding, which shares its
#   memory;
# - **stale base**: the right sum, on a base that is not quite the one we trained on.
#
# **Predict**: which of the wrong ones still answer in proper sentences? Which of them are as often
# right as the right one?

# %% id="wrong-merges"
from course_lib.export.verify import load_model


def added(scaling=adapter.scaling, skip="", turn=False, untie=True, change_base=None):
    """Base + adapter, right by default; `change_base` makes another base of each of its weights."""
    model = load_model(base.path)
    if untie:  # the output layer gets a matrix of its own before something is added to it
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    weights = {name: value.data for name, value in model.named_parameters()}
    weights.setdefault("lm_head.weight", model.lm_head.weight.data)
    for value in weights.values() if change_base else ():
        value.copy_(change_base(value))
    for module, pair in adapter.pairs.items():
        change = scaling * pair.B @ pair.A
        square = change.shape[0] == change.shape[1]
        if module != skip:
            weights[f"{module}.weight"] += change.T if turn and square else change
    return model


# %% id="wrong-answers"
def noisy(value):
    """A weight of a base that was trained a little further: 5 % away."""
    generator = torch.Generator().manual_seed(0)
    return value + 0.05 * value.std() * torch.randn(value.shape, generator=generator)


merges = {
    "merged": added(),
    "alpha, not alpha/r": added(scaling=alpha),
    "no scale": added(scaling=1.0),
    "transposed": added(turn=True),
    "one layer missing": added(skip=MODULE),
    "tied embedding": added(untie=False),
    "stale base": added(change_base=noisy),
}

# %% id="answers-of"
from course_lib.rendering import parse_completion, render_prompt

heldout = environment.heldout(HELDOUT, seed=0)
problem = heldout[0]
rows = [render_prompt(each.messages, tokenizer) for each in heldout]
width = max(map(len, rows))
ids = torch.tensor([[tokenizer.eos_token_id] * (width - len(row)) + row for row in rows])  # (B, T)
mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def answers_of(model):
    """The greedy answers to all held-out problems."""
    options = {"max_new_tokens": MAX_TOKENS, "do_sample": False}
    tokens = model.generate(ids, attention_mask=mask, **options)
    return [parse_completion(row[width:].tolist(), tokenizer) for row in tokens]


# %% id="compare-answers"
quote(f"{problem.messages[-1].content} (Right is {problem.answer}.)", "question")
right = {}
for name, model in merges.items():
    answers = answers_of(model)
    quote(answers[0], name)
    grades = [environment.grade(p, text).value for p, text in zip(heldout, answers, strict=True)]
    right[name] = sum(grades) / HELDOUT
for name, share in right.items():
    measured(f"{name}: right answers", share, "%")

# %% id="compare-bands"
band("alpha, not alpha/r: nothing is right", right["alpha, not alpha/r"] == 0)
band("No scale: a third of the right answers are gone", right["no scale"] < 0.67 * right["merged"])
for name in ("one layer missing", "stale base"):
    band(f"{name}: nearly as good as merged", right[name] > right["merged"] - 0.2)

# %% [markdown] id="logits-question"
# Only the first of the wrong ones is visibly broken; all the others answer in proper sentences.
# Without the scale the model is half trained: it falls back, mostly, to answering at once, as after
# SFT; the transposed one gives its wrong answer at once as well. What the tied embedding costs
# differs from run to run, from hardly an answer to many. With a layer missing, or on a stale base,
# an accuracy on forty problems cannot tell the wrong merge from the right one: one of them may even
# come out ahead.
#
# So answers are not enough. Compare **logits**, the numbers before any sampling. The reference is
# the adapter beside the base, two paths, as `peft` computes it (Hugging Face's library for
# adapters).

# %% id="logits"
from peft import PeftModel

from course_lib.export.peft_layout import to_peft

to_peft(download.folder, base, place / "adapter", download.base_model)
two_paths = PeftModel.from_pretrained(load_model(base.path), str(place / "adapter")).eval()


prompt = torch.tensor([rows[0]])


@torch.no_grad()
def logits_of(model):
    """The logits of the next token after the first question, as a list (V)."""
    return model(prompt).logits[0, -1].tolist()


adapted, alone = logits_of(two_paths), logits_of(load_model(base.path))
logits = {name: logits_of(model) for name, model in merges.items()}

# %% id="logits-figure"
from course_lib.plots.scatter import agreement_figure

shown = {name: logits[name][::8] for name in ("merged", "no scale", "transposed")}
show(agreement_figure(adapted[::8], shown, "Same model, same logits (every eighth)"))

# %% [markdown] id="merge-test-note"
# **Write the test.** It gets the logits of the base, of the adapter, and of the merged model, and
# the tolerance: how far rounding alone may move any one logit. When may the merged model be
# shipped?


# %% id="write-merge-test" exercise="09.2"
def merge_is_good(base, adapted, merged, tolerance):
    """Logits of the three models on the same prompt; True if the merge can be shipped."""
    far = max(abs(a - m) for a, m in zip(adapted, merged, strict=True))
    learned = max(abs(a - b) for a, b in zip(adapted, base, strict=True))
    return far <= tolerance < learned


# %% id="check-merge-test"
merge_is_good = check("09.2", merge_is_good)

# %% id="merge-test-run"
from course_lib.export.verify import TOLERANCE_FLOAT32
from course_lib.plots.merge import wrong_merges_figure

for name, values in logits.items():
    verdict = merge_is_good(alone, adapted, values, TOLERANCE_FLOAT32)
    print(f"{name}: {'ship it' if verdict else 'refused'}")
errors = {
    name: max(abs(a - b) for a, b in zip(adapted, values, strict=True))
    for name, values in logits.items()
}
show(wrong_merges_figure(errors, TOLERANCE_FLOAT32, "Seven merges of one adapter"))

# %% [markdown] id="stale-question"
# ## Which wrong merge does the test not see?
#
# The reference above was made with the right base. In life, both sides of the test read the base
# from the same folder. If *that* is stale, they are wrong together.
#
# **Predict** the verdict when adapter and merge both stand on the stale base.

# %% id="stale-run"
stale = added(scaling=0.0, change_base=noisy)  # the stale base alone
stale_folder = place / "stale-base"
shutil.copytree(base.path, stale_folder)
stale.lm_head.weight = stale.model.embed_tokens.weight  # tied, as the real base is
stale.save_pretrained(stale_folder)
beside = PeftModel.from_pretrained(load_model(stale_folder), str(place / "adapter")).eval()
verdict = merge_is_good(
    logits_of(load_model(stale_folder)), logits_of(beside), logits["stale base"], TOLERANCE_FLOAT32
)
band("The test lets the stale base pass", verdict)

# %% [markdown] id="stale-answer"
# Nothing on your own disk can find this. Only the service that trained the checkpoint knows what
# its logprobs were. So `download_adapter` asked it for the logprobs of one sentence, and the
# library compares:

# %% id="stale-source"
from course_lib.export.verify import SERVICE_TOLERANCE_NATS, service_error

show_source(service_error)
for name, model in (("right base", merges["merged"]), ("stale base", merges["stale base"])):
    error = service_error(model, download.probe)
    measured(f"{name}: mean distance from the service's logprobs", error, "nats")
    band(f"{name} is accepted", error <= SERVICE_TOLERANCE_NATS)

# %% [markdown] id="rounding-question"
# ## What does bfloat16 do to a small change?
#
# Large models are stored in bfloat16: 8 bits of precision, so neighbouring numbers differ by about
# one part in 128 to 256. A sum is rounded to the nearest of them. A change much smaller than half
# that distance is rounded away, and the weight stays exactly as it was.
#
# Our change is large: a tiny model, a high learning rate. We make it smaller, as it would be after
# a gentle fine-tune. **Predict**: at a thousandth of its size, how many weights still move? And
# what becomes of the logits?

# %% id="rounding-run"
from course_lib.plots.merge import rounding_figure


def rounded(value):
    """As bfloat16 would store it."""
    return value.bfloat16().float()


stored, before = rounded(W), torch.tensor(logits_of(added(0.0, change_base=rounded)))
sizes, unmoved, lost = [], [], []
for factor in (1, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001):
    sizes.append((factor * change / stored).abs().median().item())
    unmoved.append((rounded(stored + factor * change) == stored).float().mean().item())
    model = added(factor * adapter.scaling, change_base=rounded)
    unmerged = torch.tensor(logits_of(model))
    for value in model.parameters():
        value.data = rounded(value.data)
    off = torch.tensor(logits_of(model)) - unmerged
    lost.append((off.norm() / (unmerged - before).norm()).item())
show(rounding_figure(sizes, unmoved, lost, "A change, added in bfloat16"))
band("At full size most weights move", unmoved[0] < 0.2)
band("At a thousandth most weights stay as they were", unmoved[-1] > 0.8)
measured("at a tenth, weights that stay as they were", unmoved[2], "%")
band("At a tenth many stay, and the logits hardly notice", lost[2] < 0.1 and unmoved[2] > 0.2)
band("At a thousandth most of what was learned is lost", lost[-1] > 0.5)

# %% [markdown] id="rounding-lesson"
# Two things at once. The model bears more than the weights suggest: when a third of the weights do
# not move, the logits are still nearly right, because the roundings point in all directions and
# largely cancel. But they do not cancel for ever. At a thousandth of its size most of what was
# learned is gone, and the merged model is nearly the base, while the adapter beside the base still
# works.
#
# What to do: add in float32 and round once at the end (the library does); compare logits, with the
# *effect* of the training as the measure; and if the change is too small, serve the adapter
# unmerged. vLLM and SGLang, two widely used servers for language models, can do that, and `deploy`
# writes the adapter in the layout that both document.
#
# ## The whole way in one call
#
# `deploy()`: download, PEFT layout, merge, proof, model card, Modal files, smoke test (one
# question: does it answer, and stop?). A version appears in its folder by one rename, at the very
# end. In a shell it is `posttrain deploy --checkpoint tinker://... --out deploys/sums`.

# %% id="deploy"
from course_lib.deploy import deploy

folder = place / "sums"
stages = []
first = deploy(service, sft_checkpoint, folder, runs=place)
second = deploy(
    service, checkpoint, folder, runs=place, on_progress=lambda stage, *_: stages.append(stage)
)
print(" -> ".join(dict.fromkeys(stages)))
print("versions:", first.version.name, second.version.name)
print("inside:", ", ".join(sorted(path.name for path in second.version.iterdir())))

# %% id="deploy-proof"
proof = second.record["verification"]
print(f"{proof['tensors']} tensors compared one by one")
measured("logits: merged and adapter differ by", proof["error"])
measured("logits: merged and base differ by", proof["effect"])
measured("distance from the service", proof["service_error_nats"], "nats a token")
print("Documented rules of other servers, checked on the files and not by running them:")
for rule in second.record["serving_rules"][:4]:
    print(f"  {rule['server']}: {rule['rule']}: {'kept' if rule['kept'] else 'broken'}")

# %% [markdown] id="deploy-stale-note"
# And on the stale base? It must refuse, and leave no version behind.

# %% id="deploy-stale"
from course_lib.errors import CourseError

try:
    deploy(service, checkpoint, place / "stale", base=str(stale_folder), runs=place)
except CourseError as error:
    quote(error.finding, "refused")
band("No version was left behind", not (place / "stale" / "v1").exists())

# %% [markdown] id="key-question"
# ## Who may call it?
#
# An endpoint without a key is a gift to strangers, and you pay the bill. Clients send the key in a
# header: `Authorization: Bearer KEY`. HTTP does not care for capitals in a header's *name*, so some
# clients send `authorization`; the key counts to the letter. **Write the door.**


# %% id="write-authorised" exercise="09.3"
def authorised(headers, key):
    """True only for `Authorization: Bearer <key>` with this very key, which must not be empty."""
    import hmac

    sent = {name.lower(): value for name, value in headers.items()}.get("authorization", "")
    return key != "" and hmac.compare_digest(sent.encode(), f"Bearer {key}".encode())


# %% id="check-authorised"
authorised = check("09.3", authorised)

# %% id="authorised-probe"
for sent in ("Bearer s3cret-key", "Bearer s3cret", "Bearer s3cret-key-and-more", "s3cret-key", ""):
    print(f"{sent or '(nothing)':28} {authorised({'authorization': sent}, 's3cret-key')}")

# %% [markdown] id="serve-note"
# ## Serve it
#
# `posttrain serve DIR` speaks OpenAI's protocol, so every client library for it will do. It runs
# in a process of its own, on an address that only this machine can reach, and says where it is and
# which key it wants. `/ready` answers 200 once the model is loaded.

# %% id="serve"
import subprocess
import sys
import time

import httpx

command = [sys.executable, "-m", "course_lib.cli", "serve", str(folder), "--port", "0"]
server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
told = dict(server.stdout.readline().strip().split("=", 1) for _ in range(2))
url, key = told["OPENAI_BASE_URL"], told["OPENAI_API_KEY"]
ready = url.removesuffix("/v1") + "/ready"
while httpx.get(ready, trust_env=False, timeout=60).status_code != 200:
    time.sleep(0.1)
print("ready")

# %% id="serve-client"
import openai

caller = openai.OpenAI(base_url=url, api_key=key)
stranger = openai.OpenAI(base_url=url, api_key="a-guess", max_retries=0)
print("models:", [model.id for model in caller.models.list()])
try:
    stranger.models.list()
except openai.AuthenticationError as error:
    print("without the key:", error.status_code)

# %% [markdown] id="stream-question"
# A **stream** sends each piece of text as soon as it is there. **Predict** how many pieces an
# answer comes in: one, one a word, or one a token?

# %% id="stream"
question = {"model": "sums", "temperature": 0, "max_tokens": MAX_TOKENS}
question["messages"] = [{"role": "user", "content": problem.messages[-1].content}]
pieces = []
for event in caller.chat.completions.create(**question, stream=True):
    pieces.append(event.choices[0].delta.content or "")
quote(" | ".join(piece for piece in pieces if piece), "pieces")
whole = caller.chat.completions.create(**question)
band("Together they are the whole answer", "".join(pieces) == whole.choices[0].message.content)
measured("tokens of the answer, the last one says that it ends:", whole.usage.completion_tokens)

# %% [markdown] id="same-question"
# ## Is it the model that we evaluated?
#
# The engine ran base and adapter. The server runs merged weights, from files, in another process,
# through another protocol. Any slip in between (template, stop token, scale, dtype) shows in the
# answers. Ask both the same held-out problems, greedily (the likeliest token every time), and
# compare every answer.

# %% id="same-answers"
from course_lib.evaluation import evaluate

engine = evaluate(
    models["GRPO"], tokenizer, environment, heldout, temperature=0.0, max_tokens=MAX_TOKENS
)
served = []
for each in heldout:
    question["messages"] = [{"role": "user", "content": each.messages[-1].content}]
    served.append(caller.chat.completions.create(**question).choices[0].message.content)
same = [a == record.completions[0] for a, record in zip(served, engine.records, strict=True)]
print(f"{sum(same)} of {len(same)} answers are identical")
grades = [environment.grade(p, text).value for p, text in zip(heldout, served, strict=True)]
measured("accuracy of the served model", sum(grades) / len(grades), "%")

# %% [markdown] id="load-question"
# ## What happens under load?
#
# Sixteen people ask at once. A server that takes them one after the other makes the last one wait
# for all the others. Ours decodes **together**: at each step one token for everybody who is there,
# and a newcomer joins at the next step ("continuous batching", Yu et al. 2022, "Orca").
#
# **Predict**: compared with one after the other, is the *first token* of a typical call later or
# earlier when all ask at once? And the end of the last answer?

# %% id="load"
import asyncio

people = openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0)
began = 0.0


async def one_chat(problem):
    """(asked, first token, last token), in seconds since `began`."""
    asked, first = time.perf_counter() - began, None
    messages = [{"role": "user", "content": problem.messages[-1].content}]
    stream = await people.chat.completions.create(**question | {"messages": messages}, stream=True)
    async for event in stream:
        if first is None and event.choices[0].delta.content:
            first = time.perf_counter() - began
    return asked, first, time.perf_counter() - began


# %% id="load-run"
await one_chat(heldout[0])  # connect once before the clock runs
began = time.perf_counter()
in_turn = [await one_chat(each) for each in heldout[:CALLS]]
queue = [(0.0, first, last) for _, first, last in in_turn]  # all ask at the start
began = time.perf_counter()
at_once = await asyncio.gather(*[one_chat(each) for each in heldout[:CALLS]])
print(f"{len(queue)} and {len(at_once)} chats, no error")

# %% id="load-figure"
from course_lib.plots.serving import timeline_figure

scenarios = {"one after the other": queue, "at once": at_once}
show(timeline_figure(scenarios, f"{CALLS} streaming chats"))
waits = {name: [f - a for a, f, _ in calls] for name, calls in scenarios.items()}
waits["alone, without a queue"] = [f - a for a, f, _ in in_turn]
for name, seconds in waits.items():
    measured(f"{name}: median wait for the first token", sorted(seconds)[CALLS // 2], "s")
for name, calls in scenarios.items():
    measured(f"{name}: end of the last answer", max(end for _, _, end in calls), "s")
band("At once, all are served sooner", max(end for *_, end in at_once) < queue[-1][2])

# %% [markdown] id="load-lesson"
# A caller who is alone has the first token after milliseconds. In a queue the wait (dotted) *is*
# the queue: the sixteenth waits for the fifteen before. Decoding together, each answer (the bars)
# takes longer and the whole is faster, because a step for sixteen costs little more than a step for
# one.
#
# ## The same, on somebody else's computer
#
# `deploy` also wrote an app for [Modal](https://modal.com/docs), which rents computers by the
# second. Read it; it is short.

# %% id="modal-source"
from IPython.display import Markdown, display

source = (second.version / "modal_app.py").read_text()
display(Markdown(f"```python\n{source}```"))

# %% [markdown] id="modal-honest"
# **This app was not run on Modal**: that needs an account, and this notebook calls nobody. What
# can be checked without one: the file makes a real `modal.App`, and it asks for what we meant.

# %% id="modal-inspect"
from course_lib.modal_app import read_modal_app

for name, value in read_modal_app(second.version / "modal_app.py").items():
    print(f"{name}: {value}")

# %% [markdown] id="modal-client-note"
# The client that `deploy` wrote does not care where the endpoint is. Here it calls our own server,
# with the key and without.

# %% id="modal-client"
import os

client_file = str(second.version / "modal_client.py")
for name, sent in (("with the key", key), ("without", "")):
    variables = os.environ | {"POSTTRAIN_URL": url, "POSTTRAIN_API_KEY": sent}
    done = subprocess.run(
        [sys.executable, client_file], env=variables, capture_output=True, text=True
    )
    quote((done.stdout + done.stderr).strip().splitlines()[-1], name)
    print(f"{name}: exit code {done.returncode}")

# %% [markdown] id="cost-question"
# ## What does it cost?
#
# A rented container costs by the second while it lives: from a first request until nobody has
# asked for `scaledown_window` seconds (300 above). **Predict**: 24 short requests a day. All in one
# hour, or one an hour: which is dearer, and by how much?

# %% id="cost-probe"
from itertools import pairwise

WINDOW_S = 300


def container_seconds(arrivals_s):
    """How long a container lives in all, when requests take no time of their own."""
    gaps = [later - earlier for earlier, later in pairwise(arrivals_s)]
    return sum(min(gap, WINDOW_S) for gap in gaps) + WINDOW_S


for name, gap_s in (("all in one hour", 150), ("one an hour", 3600)):
    alive = container_seconds([gap_s * i for i in range(24)])
    print(f"{name}: {alive / 60:.1f} minutes of a container, {alive / 24:.0f} s a request")

# %% [markdown] id="cost-lesson"
# Idle time is what you pay for. A short window is cheap, and makes the next caller wait until a
# container has started and the model is loaded; a long one costs while nobody asks.
# `max_containers` bounds the bill.
#
# ## Before you ship
#
# Version 2 passed its proof and its smoke test. Both say: it *is* what you trained. Neither says:
# it is *better*. So ask both versions the same questions (in a shell: `posttrain compare`).

# %% id="smoke"
smoke = second.record["smoke"]
quote(f"{smoke['question']} {smoke['answer']}", "smoke test")
print("ended by:", smoke["finish_reason"])

# %% id="compare"
from course_lib.compare import compare

found = compare(str(first.version), str(second.version), heldout, max_tokens=MAX_TOKENS)
wins, ties, losses = found.wins_ties_losses
measured("version 2 wins, a tie counting half:", found.win_rate_b, "%")
measured("lower end of the 95 % interval", found.interval[0], "%")
band("Version 2 is better, and it is not luck", found.interval[0] > 0.5)
seconds = found.median_seconds
measured("version 2's answers take longer by a factor of", seconds[1] / seconds[0])

# %% [markdown] id="rollback-note"
# Better, and slower: it writes its steps down. That is for you to weigh, and better known before
# than after. Suppose that it was the wrong choice. One command goes back (in a terminal: `posttrain
# rollback` and the folder), and nothing is deleted.
# A server that is running goes on with what it has loaded, until it is started again.

# %% id="rollback"
from course_lib.export.versions import current_version, rollback

print("current:", current_version(folder).name)
print("after rollback:", rollback(folder).name)
again = deploy(service, checkpoint, folder, runs=place)
print("deployed again:", again.version.name, "made before" if again.reused else "made anew")

# %% [markdown] id="card-question"
# ## What does the reader of your model need to know?
#
# A model without a card is a file of unknown origin. Hubs read the front matter, lines of
# `key: value` between two lines `---` at the very top: base model, licence, tags. People read the
# rest: its name, what it was trained on, how good it is and on how many problems, what was not
# measured. **Write one.**


# %% id="write-model-card" exercise="09.4"
def model_card(name, base_model, licence, accuracy, problems):
    """Markdown: front matter (base_model, license), evaluation, limitations; accuracy 0..1."""
    return f"""---
base_model: {base_model}
license: {licence}
---
# {name}

A LoRA fine-tune of {base_model}, merged: SFT on short conversations, then GRPO on sums.

## Evaluation

{accuracy:.1%} right on {problems} held-out sums of three two-digit numbers, greedy.

## Limitations

Only such sums were measured. It knows nothing of the world, and was not tested for safety.
"""


# %% id="check-model-card"
model_card = check("09.4", model_card)

# %% id="model-card-run"
accuracy = sum(grades) / len(grades)
quote(model_card("sums", service.base_model, "mit", accuracy, HELDOUT), "your card")
written = (second.model / "README.md").read_text()
print("The card that deploy wrote has the sections")
print("\n".join(line for line in written.splitlines() if line.startswith("## ")))

# %% [markdown] id="upload-note"
# `posttrain deploy --upload ada/sums --dry-run` lists what would go to the Hugging Face Hub, with
# sizes, and refuses a folder that holds a key. Without `--dry-run` it uploads, to a private
# repository. The course's tests do that against a stand-in for the Hub, never the Hub itself.

# %% id="upload-dry-run"
from course_lib.export.hub import upload

plan = upload(second.model, "ada/sums", dry_run=True)
for name, size in plan.files:
    print(f"{name}: {size / 1e6:.2f} MB")

# %% [markdown] id="stop-note"
# Stop the server as you would a real one: it takes nothing new, finishes what is running, and goes.
# (On Linux and macOS the code -15 means that it went at our request: signal 15 is the polite one,
# SIGTERM.)

# %% id="stop"
server.terminate()
print("server ended with code", server.wait(timeout=60))
shutil.rmtree(place)

# %% id="progress"
progress()

# %% [markdown] id="take-away"
# ## What to take away
#
# - A LoRA checkpoint is pairs of matrices, a rank and an alpha. Without its base it is nothing.
# - A merge is $W + \frac{\alpha}{r}BA$. A wrong one runs, loads and answers; compare logits, to the
#   adapter and to the base.
# - A stale base is invisible at home. Only the service that trained the checkpoint can tell.
# - bfloat16 rounds small changes away. Add in float32, check, or serve the adapter unmerged.
# - Serve with a key, stream, decode together; the idle hour is what costs.
# - "Is it the model I trained?" and "is it better?" are two questions. Answer both, and keep the
#   version before.
#
# ## What next
#
# [10 Clinic and capstone](10_clinic.ipynb): your own data, your own reward.
