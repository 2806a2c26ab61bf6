"""Claims about course_lib.rendering and chat_text: which tokens are learned, for each family."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from chat_templates import (
    CHATML,
    COURSE,
    END_AT_THE_VERY_END,
    FAMILIES,
    FORGETFUL,
    GEMMA,
    HEADER_NOT_ASKED_FOR,
    LLAMA3,
    MISTRAL,
    NO_END,
    QWEN3,
    SPECIALS,
    THINKING_HEADER,
    byte_tokenizer,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from course_lib.chat_text import chat_text, encode, end_of_turn
from course_lib.conversations import Conversation, Message
from course_lib.errors import CourseError
from course_lib.rendering import (
    Rendered,
    parse_completion,
    render_conversation,
    render_prompt,
    stop_token_ids,
)

TOKENIZERS = {name: byte_tokenizer(template) for name, template in FAMILIES.items()}
TOKENIZERS["no template"] = byte_tokenizer(None)
PLAIN = [name for name in TOKENIZERS if name != "qwen3"]  # Qwen3 adds a thinking block
ENDS = {
    "course": "<|end|>",
    "chatml": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "qwen3": "<|im_end|>",
    "mistral": "</s>",
    "no template": "<|end|>",
}


def conversation(*contents: str, system: str | None = None) -> Conversation:
    """User and assistant take turns."""
    messages = [Message("system", system)] if system is not None else []
    for index, content in enumerate(contents):
        messages.append(Message(("user", "assistant")[index % 2], content))
    return Conversation(tuple(messages), "rows.jsonl:7")


def learned(rendered: Rendered, tokenizer: PreTrainedTokenizerFast) -> str:
    """The text with weight 1; stretches apart are joined by a bar."""
    marked = [
        token if weight else None
        for token, weight in zip(rendered.tokens, rendered.weights, strict=True)
    ]
    stretches: list[list[int]] = [[]]
    for token in marked:
        if token is None:
            stretches.append([])
        else:
            stretches[-1].append(token)
    return "|".join(tokenizer.decode(stretch) for stretch in stretches if stretch)


# --------------------------------------------------------------------------------------------------
# What is learned


def test_the_shipped_template_token_by_token() -> None:
    tokenizer = TOKENIZERS["course"]
    rendered = render_conversation(conversation("ab", "xyz"), tokenizer)
    names = [tokenizer.decode([token]) for token in rendered.tokens]
    assert names == ["<|user|>", "a", "b", "<|end|>", "<|assistant|>", "x", "y", "z", "<|end|>"]
    assert rendered.weights == [0.0] * 5 + [1.0] * 4
    assert rendered.source == "rows.jsonl:7"


@pytest.mark.parametrize("name", PLAIN)
def test_only_the_last_answer_and_its_end_are_learnt(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    rendered = render_conversation(conversation("one", "two", "three", "four"), tokenizer)
    space = " " if name == "mistral" else ""  # its template puts one before the answer
    assert learned(rendered, tokenizer) == f"{space}four{ENDS[name]}"


@pytest.mark.parametrize("name", PLAIN)
def test_all_assistant_learns_each_answer_and_each_end(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    chat = conversation("one", "two", "three", "four", system=None if name == "mistral" else "s")
    rendered = render_conversation(chat, tokenizer, "all_assistant")
    space = " " if name == "mistral" else ""
    assert learned(rendered, tokenizer) == f"{space}two{ENDS[name]}|{space}four{ENDS[name]}"


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("train_on", ["last_assistant", "all_assistant"])
def test_the_tokens_are_those_of_the_template(name: str, train_on: str) -> None:
    """Cross-check with transformers' own path from messages to ids."""
    tokenizer = TOKENIZERS[name]
    chat = conversation("What is 2 + 3?", "The answer is 5.")
    rendered = render_conversation(chat, tokenizer, train_on)
    dicts = [{"role": m.role, "content": m.content} for m in chat.messages]
    if tokenizer.chat_template:
        expected = tokenizer.apply_chat_template(dicts, return_dict=False)
        assert rendered.tokens == expected
    assert rendered.tokens == encode(chat_text(chat.messages, tokenizer), tokenizer)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_prompt_ends_with_the_header_and_training_goes_on_from_it(name: str) -> None:
    """The sampler sees these tokens; what is learned begins right behind them."""
    tokenizer = TOKENIZERS[name]
    chat = conversation("one", "two", "three", "four")
    prompt = render_prompt(chat.prompt, tokenizer)
    rendered = render_conversation(chat, tokenizer)
    assert rendered.tokens[: len(prompt)] == prompt
    assert rendered.weights[: len(prompt)] == [0.0] * len(prompt)
    assert rendered.weights[len(prompt)] == 1.0


def test_qwen3_learns_the_thinking_block_that_it_will_have_to_write() -> None:
    """The prompt ends before the block, so a model that has not learned it would not write it."""
    tokenizer = TOKENIZERS["qwen3"]
    rendered = render_conversation(conversation("a", "b", "c", "d"), tokenizer)
    assert learned(rendered, tokenizer) == "<think>\n\n</think>\n\nd<|im_end|>"
    thought = conversation("a", "<think>\nold\n</think>\n\nb", "c", "<think>\nnew\n</think>\n\nd")
    rendered = render_conversation(thought, tokenizer)
    assert learned(rendered, tokenizer) == "<think>\nnew\n</think>\n\nd<|im_end|>"
    assert "old" not in tokenizer.decode(rendered.tokens)


def test_qwen3_refuses_all_answers_of_a_history_that_it_rewrites() -> None:
    tokenizer = TOKENIZERS["qwen3"]
    sentence = (
        r"rows\.jsonl:7: the chat template leaves in doubt .*; mark answers .* \{% generation"
    )
    with pytest.raises(CourseError, match=sentence):
        render_conversation(conversation("a", "b", "c", "d"), tokenizer, "all_assistant")
    one_answer = render_conversation(conversation("a", "b"), tokenizer, "all_assistant")
    assert learned(one_answer, tokenizer).endswith("b<|im_end|>")


def test_gemma_folds_the_system_message_into_the_question() -> None:
    tokenizer = TOKENIZERS["gemma"]
    rendered = render_conversation(conversation("q", "a", system="Be brief."), tokenizer)
    text = tokenizer.decode(rendered.tokens)
    assert text.startswith("<bos><start_of_turn>user\nBe brief.\n\nq<end_of_turn>")
    assert learned(rendered, tokenizer) == "a<end_of_turn>"


def test_what_comes_after_the_last_answer_is_left_out() -> None:
    for name in PLAIN:
        tokenizer = TOKENIZERS[name]
        chat = conversation("one", "two", "three")
        shorter = conversation("one", "two")
        assert render_conversation(chat, tokenizer) == render_conversation(shorter, tokenizer)


def test_a_token_never_straddles_the_border_of_header_and_answer() -> None:
    """Two newlines are one token here. Sampling starts after the header's own newline."""
    tokenizer = TOKENIZERS["chatml"]
    chat = conversation("one", "\ntwo")
    assert tokenizer.encode("\n\n") != tokenizer.encode("\n") * 2  # or the test would show nothing
    rendered = render_conversation(chat, tokenizer)
    prompt = render_prompt(chat.prompt, tokenizer)
    assert rendered.tokens[: len(prompt)] == prompt
    assert learned(rendered, tokenizer) == "\ntwo<|im_end|>"
    assert tokenizer.decode(rendered.tokens) == chat_text(chat.messages, tokenizer)


def test_a_sentencepiece_tokenizer_gets_no_space_between_header_and_answer() -> None:
    """Encoded on its own, `yes` would become `_yes` with a space that is not in the template."""
    words = ["<unk>", "</s>", "▁", "yes", "▁yes", "no", "▁no", "\n", "assistant:", "user:"]
    words += ["▁assistant:", "▁user:", *"abcdefghijklmnopqrstuvwxyz:"]
    vocab = [(word, -1.0 * (len(words) - len(word))) for word in words]
    inner = Tokenizer(models.Unigram(vocab, unk_id=0))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Metaspace(prepend_scheme="first")
    inner.add_special_tokens(["</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("yes")) == ["▁yes"]
    rendered = render_conversation(conversation("no", "yes"), tokenizer)
    pairs = zip(rendered.tokens, rendered.weights, strict=True)
    kept = [token for token, weight in pairs if weight]
    assert tokenizer.convert_ids_to_tokens(kept) == ["yes", "</s>"]


def test_a_tokenizer_that_begins_every_text_adds_no_second_beginning() -> None:
    """Llama's `encode` adds a beginning of text; its template writes one already."""
    tokenizer = byte_tokenizer(LLAMA3)
    begin, begin_id = "<|begin_of_text|>", tokenizer.convert_tokens_to_ids("<|begin_of_text|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, begin_id)]
    )
    assert tokenizer.encode("a")[0] == begin_id  # or the test would show nothing
    chat = conversation("one", "two")
    assert render_conversation(chat, tokenizer).tokens.count(begin_id) == 1
    assert render_prompt(chat.prompt, tokenizer).count(begin_id) == 1


# --------------------------------------------------------------------------------------------------
# Where the template leaves doubts: marks, or a refusal


def marked(template: str, before: str = "{{ m.content", after: str = "}}<|end|>") -> str:
    """The same template with generation marks around an assistant's words (and their end)."""
    words = before + after
    assert words in template
    answer = "{% generation %}" + words + "{% endgeneration %}"
    branch = "{% if m.role == 'assistant' %}" + answer + "{% else %}" + words + "{% endif %}"
    return template.replace(words, branch)


WORDS = {"before": "{{ m.content ", "after": "}}<|end|>"}


def test_generation_marks_rescue_a_template_that_rewrites_history() -> None:
    stable = conversation("a", "b")
    forgetful = byte_tokenizer(marked(FORGETFUL, **WORDS))
    rendered = render_conversation(stable, forgetful, "all_assistant")
    assert learned(rendered, forgetful) == "b<|end|>"
    headerless = byte_tokenizer(marked(HEADER_NOT_ASKED_FOR, **WORDS))
    chat = conversation("a", "b", "c", "d")
    rendered = render_conversation(chat, headerless, "all_assistant")
    assert learned(rendered, headerless) == "b<|end|>|d<|end|>"
    rendered = render_conversation(chat, headerless)
    assert learned(rendered, headerless) == "d<|end|>"


def test_marks_that_stop_before_the_end_of_turn_are_stretched_to_it() -> None:
    template = marked(HEADER_NOT_ASKED_FOR, "{{ m.content ", "}}")
    assert "{% endgeneration %}{% else %}" in template and "<|end|>{% endgen" not in template
    tokenizer = byte_tokenizer(template)
    assert learned(render_conversation(conversation("a", "b"), tokenizer), tokenizer) == "b<|end|>"


def test_marks_that_miss_an_answer_are_not_believed() -> None:
    tokenizer = byte_tokenizer(marked(FORGETFUL, **WORDS))
    with pytest.raises(CourseError, match="leaves in doubt"):
        render_conversation(conversation("a", "b", "c", "d"), tokenizer, "all_assistant")


DOUBTFUL = {
    "header not asked for": (HEADER_NOT_ASKED_FOR, "leaves in doubt"),
    "header not asked for, empty answer": (HEADER_NOT_ASKED_FOR, "leaves in doubt"),
    "thinking header": (THINKING_HEADER, "leaves in doubt"),
    "no end": (NO_END, "no special token ends an answer"),
    "raises": (COURSE + "{{ raise_exception('not today') }}", "refuses .*not today"),
    "is no template": ("{% for %}", "chat template refuses"),
}


@pytest.mark.parametrize("case", DOUBTFUL)
@pytest.mark.parametrize("train_on", ["last_assistant", "all_assistant"])
def test_a_template_in_doubt_is_refused_with_its_row(case: str, train_on: str) -> None:
    template, sentence = DOUBTFUL[case]
    tokenizer = byte_tokenizer(template, SPECIALS[COURSE])
    chat = conversation("a", "" if "empty" in case else "b")
    with pytest.raises(CourseError, match=r"rows\.jsonl:7: .*" + sentence):
        render_conversation(chat, tokenizer, train_on)


def test_history_that_vanishes_or_is_closed_only_at_the_end_is_refused_for_all_answers() -> None:
    chat = conversation("a", "b", "c", "d")
    for template in (FORGETFUL, END_AT_THE_VERY_END):
        tokenizer = byte_tokenizer(template, SPECIALS[COURSE])
        with pytest.raises(CourseError, match="leaves in doubt"):
            render_conversation(chat, tokenizer, "all_assistant")
        rendered = render_conversation(chat, tokenizer)
        assert learned(rendered, tokenizer) == "d<|end|>"


def test_a_template_that_insists_on_turns_refuses_two_questions_in_a_row() -> None:
    messages = (Message("user", "a"), Message("user", "b"), Message("assistant", "c"))
    with pytest.raises(CourseError, match="turns must alternate"):
        render_conversation(Conversation(messages), TOKENIZERS["gemma"])


def test_an_answer_to_nothing_is_refused_not_guessed() -> None:
    alone = Conversation((Message("assistant", "hello"),))
    with pytest.raises(CourseError, match="leaves in doubt"):
        render_conversation(alone, TOKENIZERS["course"])
    greeting = Conversation(
        (Message("assistant", "hello"), Message("user", "a"), Message("assistant", "b"))
    )
    rendered = render_conversation(greeting, TOKENIZERS["course"])
    assert learned(rendered, TOKENIZERS["course"]) == "b<|end|>"


def test_a_conversation_without_an_answer_is_refused() -> None:
    with pytest.raises(CourseError, match=r"rows\.jsonl:7: no assistant message"):
        render_conversation(conversation("a"), TOKENIZERS["course"])


def test_an_unknown_train_on_names_the_choices() -> None:
    with pytest.raises(CourseError, match="'all' is unknown; use last_assistant or all_assistant"):
        render_conversation(conversation("a", "b"), TOKENIZERS["course"], "all")


def test_a_tokenizer_without_template_and_end_of_text_is_refused() -> None:
    tokenizer = byte_tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(CourseError, match="neither a chat template nor an end-of-text token"):
        render_prompt([Message("user", "a")], tokenizer)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(CourseError, match="refuses the messages"):
        render_prompt([], TOKENIZERS["course"])


# --------------------------------------------------------------------------------------------------
# Stop tokens, parsing, forged control tokens


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_end_of_turn_is_read_from_the_template(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    assert end_of_turn(tokenizer) == ENDS[name]
    stops = tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer))
    assert stops == list(dict.fromkeys([ENDS[name], tokenizer.eos_token]))


def test_without_an_end_in_the_template_end_of_text_stops() -> None:
    tokenizer = byte_tokenizer(NO_END, SPECIALS[COURSE])
    assert tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer)) == ["<|end|>"]
    tokenizer.eos_token = None
    with pytest.raises(CourseError, match="no token that ends a message"):
        stop_token_ids(tokenizer)


def test_a_completion_ends_at_the_first_stop_token() -> None:
    tokenizer = TOKENIZERS["chatml"]
    tokens = tokenizer.encode("5<|im_end|>\n<|im_start|>user\nmore")
    assert parse_completion(tokens, tokenizer) == "5"
    assert parse_completion(tokenizer.encode("5<|endoftext|>6"), tokenizer) == "5"
    assert parse_completion([], tokenizer) == ""
    assert parse_completion(tokenizer.encode("cut off "), tokenizer) == "cut off "


def test_a_stray_header_in_a_completion_is_shown() -> None:
    """Hidden, it would be paid for: a reward must see what the policy wrote."""
    tokenizer = TOKENIZERS["course"]
    tokens = tokenizer.encode("5<|user|>6<|end|>")
    assert parse_completion(tokens, tokenizer) == "5<|user|>6"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_typed_control_token_forges_no_turn(name: str) -> None:
    """Rendered plainly, these messages would end a question early, or begin another turn."""
    tokenizer = TOKENIZERS[name]
    specials = tokenizer.all_special_tokens + [
        token.content for token in tokenizer.added_tokens_decoder.values() if token.special
    ]
    plain = render_conversation(conversation("question", "answer"), tokenizer)
    for forged in specials:
        chat = conversation(f"question{forged}", f"{forged}answer{forged}{forged}")
        rendered = render_conversation(chat, tokenizer)
        assert [t for t in rendered.tokens if t in tokenizer.all_special_ids] == [
            t for t in plain.tokens if t in tokenizer.all_special_ids
        ]
        assert tokenizer.decode(rendered.tokens).count(forged) >= 4  # the text is all there
        assert learned(rendered, tokenizer).count("answer") == 1
        start = len(render_prompt(chat.prompt, tokenizer))
        said = parse_completion(rendered.tokens[start:], tokenizer)
        assert said.endswith(f"{forged}answer{forged}{forged}")


def test_a_seam_in_the_text_cannot_join_the_halves_of_a_control_token() -> None:
    tokenizer = TOKENIZERS["course"]
    chat = conversation("<|e\ufdd0nd|>", "ok")
    special = [t for t in render_conversation(chat, tokenizer).tokens if t >= 263]
    assert len(special) == 4


# --------------------------------------------------------------------------------------------------
# Properties

text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufdd0"), max_size=30)
turns = st.lists(st.tuples(text, text), min_size=1, max_size=3)


def chat_of(pairs: list[tuple[str, str]]) -> Conversation:
    return conversation(*[content for pair in pairs for content in pair])


@settings(deadline=None, max_examples=60)
@given(turns, st.sampled_from(["course", "chatml", "no template", "mistral"]))
def test_the_weights_sum_to_the_tokens_of_the_last_answer_and_its_end(pairs, name: str) -> None:
    tokenizer = TOKENIZERS[name]
    chat = chat_of(pairs)
    answer = chat.answer if name != "mistral" else " " + chat.answer
    expected = len(tokenizer.encode(answer)) + 1
    assert sum(render_conversation(chat, tokenizer).weights) == expected


@settings(deadline=None, max_examples=60)
@given(turns, st.sampled_from(["course", "chatml", "llama3", "gemma", "no template"]))
def test_rendering_then_parsing_gives_every_answer_back(pairs, name: str) -> None:
    tokenizer = TOKENIZERS[name]
    chat = chat_of(pairs)
    for train_on, answers in {
        "last_assistant": [pairs[-1][1]],
        "all_assistant": [answer for _, answer in pairs],
    }.items():
        rendered = render_conversation(chat, tokenizer, train_on)
        assert len(rendered.tokens) == len(rendered.weights)
        assert set(rendered.weights) <= {0.0, 1.0}
        stretches = "".join(str(int(weight)) for weight in rendered.weights)  # e.g. 000111000111
        said = [
            parse_completion(rendered.tokens[found.start() : found.end()], tokenizer)
            for found in re.finditer("1+", stretches)
        ]
        if name in ("llama3", "gemma"):  # these templates trim, by Jinja's idea of white space
            assert said == [answer.strip() for answer in answers]
        else:
            assert said == answers


@settings(deadline=None, max_examples=40)
@given(turns, st.sampled_from(list(TOKENIZERS)))
def test_training_always_goes_on_from_the_sampling_prompt(pairs, name: str) -> None:
    tokenizer = TOKENIZERS[name]
    chat = chat_of(pairs)
    prompt = render_prompt(chat.prompt, tokenizer)
    rendered = render_conversation(chat, tokenizer)
    assert rendered.tokens[: len(prompt)] == prompt
    assert not any(rendered.weights[: len(prompt)])
    assert tokenizer.decode(rendered.tokens) == chat_text(chat.messages, tokenizer)


def test_importing_the_rules_needs_neither_transformers_nor_torch() -> None:
    code = (
        "import sys, course_lib.rendering, course_lib.batches\n"
        "print([name for name in ('torch', 'transformers', 'tinker') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


assert {COURSE, CHATML, LLAMA3, GEMMA, QWEN3, MISTRAL} == set(FAMILIES.values())


def test_another_template_on_the_same_tokenizer_ends_its_turns_otherwise() -> None:
    """What ends a turn is remembered, and was asked of one template."""
    tokenizer = byte_tokenizer(CHATML)
    assert end_of_turn(tokenizer) == "<|im_end|>"
    tokenizer.chat_template = COURSE
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    assert end_of_turn(tokenizer) == "<|end|>"
