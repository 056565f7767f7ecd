"""Asking a model: batches against one by one and against loops by hand; ranking in float64."""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import benchmark_files as files
import pytest
import tiny
import torch
from PIL import Image

import fastprompt
from fastprompt.eval import InputError, Question, judge
from fastprompt.eval.generate import answers, asked, conversation, encode, generate
from fastprompt.eval.rank import choices, log_likelihoods
from fastprompt.train.rows import Blob, Row
from fastprompt.train.templates import IGNORE, NAMED, ChatTemplate, count_image_tokens

TEXTS = ("is it?", "what is in the image, a cat or a dog?", "how many?", "e", "is this a test?")
OPTIONS = ("yes", "no", "a cat", "yesterday", "entailment", "y")
NEW = 6


def picture(seed: int) -> Image.Image:
    pixels = torch.randint(0, 256, (12, 10, 3), generator=torch.manual_seed(seed))
    return Image.fromarray(pixels.numpy().astype("uint8"))


def model_of(kind: str, dtype=torch.float32):
    """Plain, or with prompts that matter."""
    model = files.llava(dtype)
    if kind == "patched":
        patch = fastprompt.patch(model)
        torch.manual_seed(3)
        with torch.no_grad():
            for p in patch.trainable.values():
                p.add_(torch.randn_like(p))
        patch.refresh()
    return model.eval()


KINDS = pytest.mark.parametrize("kind", ["plain", "patched"])


@pytest.fixture(scope="module")
def processor():
    return files.processor()


@KINDS
def test_a_padded_batch_answers_as_one_by_one_and_as_a_loop(kind, processor):
    model, images = model_of(kind), [picture(n) for n in range(len(TEXTS))]
    together = generate(model, processor, images, list(TEXTS), max_new_tokens=NEW)
    alone = [
        generate(model, processor, [image], [text], max_new_tokens=NEW)[0]
        for image, text in zip(images, TEXTS, strict=True)
    ]
    assert together == alone and len(set(together)) > 1
    by_hand = []
    for image, text in zip(images, TEXTS, strict=True):
        given = encode(model, processor, [image], [conversation(processor, text)])
        ids, start = given.pop("input_ids"), given.pop("attention_mask").shape[1]
        for _ in range(NEW):
            with torch.no_grad():
                new = model(input_ids=ids, **given, use_cache=False).logits[:, -1].argmax(-1)
            ids = torch.cat([ids, new[None]], dim=1)
            if new.item() == processor.tokenizer.eos_token_id:
                break
        by_hand.append(processor.tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip())
    assert together == by_hand


def test_what_a_checkpoint_says_of_sampling_is_not_followed(processor, recwarn):
    model = model_of("plain")
    once = generate(model, processor, [picture(0)], [TEXTS[0]], max_new_tokens=NEW)
    said = model.generation_config
    said.do_sample, said.temperature, said.top_p, said.num_beams = True, 9.0, 0.9, 3
    torch.manual_seed(5)
    assert generate(model, processor, [picture(0)], [TEXTS[0]], max_new_tokens=NEW) == once
    assert not recwarn.list


def test_answers_are_of_all_questions_with_their_suffix(processor, monkeypatch):
    model, seen = model_of("plain"), []
    questions = [Question(f"x/{n}", picture(n), text, ("yes",)) for n, text in enumerate(TEXTS)]
    expected = generate(
        model, processor, [picture(n) for n in range(5)], [f"{t}\nBriefly." for t in TEXTS],
        max_new_tokens=NEW,
    )  # fmt: skip
    options = dict(batch=2, max_new_tokens=NEW, suffix="Briefly.")
    for part in answers(model, processor, questions, **options):
        seen.append(part)
    # "e"; "is it?" and "how many?", …: of like length together
    assert [list(part) for part in seen] == [["x/3", "x/0"], ["x/2", "x/4"], ["x/1"]]
    assert {k: v for part in seen for k, v in part.items()} == {
        f"x/{n}": text for n, text in enumerate(expected)
    }
    assert asked(questions[0], "") == TEXTS[0]


def test_a_processor_without_a_template_is_refused():
    processor = files.processor()
    processor.chat_template = None
    with pytest.raises(InputError, match="--chat-template"):
        conversation(processor, "is it?")
    processor = files.processor()
    processor.image_token = "<no such token>"
    with pytest.raises(InputError, match="want a tokenizer that knows") as error:
        conversation(processor, "is it?")
    assert "--template" not in str(error.value)  # none of them would help


def test_a_template_may_want_plain_texts():
    """As language models' own do, and so a LLaVA assembled from one."""
    processor = files.processor()
    processor.chat_template = (
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    asked = conversation(processor, "is it?")
    assert asked == "<user><image>\nis it? <assistant>"
    assert conversation(processor, "is it?", "yes") == asked + "yes "


THINKS = (
    "{% for m in messages %}{{ '<s>' + m.role + ' ' }}{% if m.role == 'assistant' %}"
    "{{ 'think\n' }}{% endif %}{{ m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant ' }}{% endif %}"
)


@pytest.mark.parametrize("jinja", [NAMED["chatml"].jinja, THINKS])
def test_a_question_is_asked_with_the_very_tokens_that_came_before_answers_in_training(jinja):
    processor = files.processor()
    processor.chat_template = jinja
    template = ChatTemplate(processor, "auto", count_image_tokens(processor))
    turns = [("user", "<image>\nis it a test?"), ("assistant", "yes")]
    trained = template.encode(Row("x", "f:1", turns, Blob(Path("x.png"))))
    before = next(n for n, label in enumerate(trained.labels) if label != IGNORE)
    asked = conversation(processor, "is it a test?")
    given = encode(model_of("plain"), processor, [picture(0)], [asked])
    assert given["input_ids"][0].tolist() == trained.ids[:before]


def test_a_bos_of_the_template_is_not_doubled():
    processor, model = files.processor(), model_of("plain")
    processor.tokenizer.add_bos_token = True
    text = conversation(processor, "is it?")
    with_bos = encode(model, processor, [picture(0)], [f"<s>{text}"])["input_ids"][0]
    assert (with_bos == 1).sum() == 1 and with_bos[0] == 1


# ---- ranking ----


@pytest.mark.parametrize("join", [False, True])
@KINDS
def test_ranking_is_the_log_softmax_by_hand_in_float64(kind, join):
    model, processor = model_of(kind, torch.float64), files.processor(join)
    tiny.in_float64(model)
    found = log_likelihoods(model, processor, picture(1), TEXTS[1], OPTIONS, batch=4)
    prompt = conversation(processor, TEXTS[1])
    for option, (tokens, greedy) in zip(OPTIONS, found, strict=True):
        given = encode(model, processor, [picture(1)], [f"{prompt} {option}"])
        # its own letters, the space before them (or that with the colon that it is joined to)
        own = len(option) + 1
        assert given["input_ids"][0, -own] == (56 if join else processor.tokenizer.vocab[" "])
        with torch.no_grad():
            logits = model(**given, use_cache=False).logits[0, -own - 1 : -1]
        ids = given["input_ids"][0, -own:]
        expected = logits.log_softmax(-1)[torch.arange(own), ids]
        assert tokens.dtype == torch.float64 and tokens.shape == expected.shape
        torch.testing.assert_close(tokens, expected, atol=1e-10, rtol=1e-10)
        assert greedy == bool((logits.argmax(-1) == ids).all())


@KINDS
def test_ranking_takes_the_highest_mean_and_sees_the_image_once(kind, processor):
    model, looked = model_of(kind), []
    tower = model.model.vision_tower
    tower.register_forward_hook(lambda *_: looked.append(1))
    questions = [
        Question(f"x/{n}", picture(n), text, ("yes",), OPTIONS) for n, text in enumerate(TEXTS)
    ]
    by_batch = [
        {k: v for part in choices(model, processor, questions, batch=b, suffix="") for k, v in
         part.items()}
        for b in (1, 4, 8)
    ]  # fmt: skip
    assert len(looked) == 3 * len(questions)
    assert by_batch[0] == by_batch[1] == by_batch[2]
    means, sums = [], []
    for q in questions:
        found = log_likelihoods(model, processor, q.open(), q.text, OPTIONS)
        means.append(OPTIONS[max(range(6), key=lambda i: found[i][0].mean())])
        sums.append(OPTIONS[max(range(6), key=lambda i: found[i][0].sum())])
    assert list(by_batch[0].values()) == means != sums


def test_options_that_are_greedy_are_known(processor):
    """An option is greedy just if greedy decoding says it, token for token."""
    model, vocab = model_of("plain"), processor.tokenizer.vocab
    head = model.lm_head.weight
    # a model that says one letter after another: " abab…", whatever it sees
    following = {vocab[":"]: vocab[" "], vocab[" "]: vocab["a"], vocab["a"]: vocab["b"]}
    following[vocab["b"]] = vocab["a"]

    def say(ids, hidden):
        wanted = torch.tensor([following.get(i, vocab["?"]) for i in ids.flatten().tolist()])
        return torch.nn.functional.one_hot(wanted, len(head)).view(*ids.shape, -1) * 5.0

    seen = []
    model.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["input_ids"]), with_kwargs=True
    )
    model.lm_head.register_forward_hook(
        lambda _, args, out: say(seen[-1][:, -out.shape[1] :], out).to(out.dtype)
    )
    assert generate(model, processor, [picture(0)], ["is"], max_new_tokens=5) == ["abab"]
    options = ("a", "ab", "aba", "aa", "b", "abb", "bab")
    found = log_likelihoods(model, processor, picture(0), "is", options)
    assert [greedy for _, greedy in found] == [o == "abab"[: len(o)] for o in options]


def test_an_option_ends_before_what_the_template_adds(processor):
    ending = files.processor()
    ending.chat_template = files.CHAT.replace("{{ c.text }} ", "{{ c.text }} </s>")
    prompt = "is it? </s>ASSISTANT:"  # whose </s> and S are no answers either
    assert conversation(ending, "is it?").endswith(prompt)
    model = model_of("plain")
    for option, letters in (("s", 2), ("S", 2), ("yes", 4)):
        (tokens, _), *rest = log_likelihoods(model, ending, picture(0), "is it?", (option, "no"))
        assert len(tokens) == letters and len(rest) == 1


def test_a_template_that_hides_the_answer_is_refused(processor):
    other = files.processor()
    other.chat_template = files.CHAT.replace("{{ c.text }}", "{{ c.text.upper() }}")
    with pytest.raises(InputError, match="puts 'yes' after"):
        log_likelihoods(model_of("plain"), other, picture(0), TEXTS[0], ("yes",))


# ---- the judge ----


class Judge:
    """Says of each prompt what is written down for it; padding is on the left."""

    device = "cpu"

    def __init__(self, tokenizer, says):
        self.tokenizer, self.says, self.prompts = tokenizer, says, []

    def generate(self, input_ids, attention_mask, **options):
        assert options["max_new_tokens"] == 5 and options["do_sample"] is False
        new = []
        for row, mask in zip(input_ids, attention_mask, strict=True):
            assert mask[-1] == 1
            self.prompts.append(self.tokenizer.decode(row[mask.bool()]))
            word = next(w for key, w in self.says.items() if key in self.prompts[-1])
            new.append(self.tokenizer(f" {word}")["input_ids"][:5])
        width = max(map(len, new))
        new = [ids + [self.tokenizer.pad_token_id] * (width - len(ids)) for ids in new]
        return torch.cat([input_ids, torch.tensor(new)], dim=1)


def test_the_judge_is_read_by_its_own_words_alone():
    tok = files.tokenizer()
    questions = [
        Question("x/0", picture(0), "is it crimson?", ("yes",), group="a"),
        Question("x/1", picture(0), "is it green?", ("no",), group="a"),
        Question("x/2", picture(0), "what is it?", ("a cat", "a dog", "a dog"), group="b"),
        Question("x/3", picture(0), "is it missing?", ("no",), group="a"),
    ]
    said = {"x/0": "yes it is", "x/1": "yes", "x/2": "some dog", "x/3": None}
    model = Judge(tok, {"crimson": "yes", "green": "no", "what": "yes. It"})
    found = {}
    for part in judge.verdicts(model, tok, questions, said, batch=2):
        found |= part
    assert found == {"x/0": "yes", "x/1": "no", "x/2": "yes."}
    assert "Prediction: some dog" in model.prompts[2].replace("<unk>rediction", "Prediction")
    assert "nswer: a dog\n" in model.prompts[2] and "uestions: what is it?\n" in model.prompts[2]
    assert judge.accuracy(questions, found) == pytest.approx((1 / 3 + 1) / 2)  # mean of groups


# ---- lmms-eval ----


class lmms:
    """What lmms-eval's base class gives a model."""

    def __init__(self):
        self.task_dict = {"t": {"test": [{"image": picture(n), "answer": "no"} for n in range(5)]}}


@pytest.fixture
def adapter(monkeypatch):
    def load(with_lmms=True):
        monkeypatch.delitem(sys.modules, "fastprompt.eval.lmms_eval", raising=False)
        names = ["lmms_eval", "lmms_eval.api", "lmms_eval.api.model"]
        names += ["lmms_eval.models", "lmms_eval.models.registry_v2"]
        for name in names:
            monkeypatch.setitem(sys.modules, name, ModuleType(name) if with_lmms else None)
        if with_lmms:
            sys.modules["lmms_eval.api.model"].lmms = lmms
            sys.modules["lmms_eval.models.registry_v2"].ModelManifest = lambda model_id, **paths: (
                SimpleNamespace(model_id=model_id, **paths)
            )
        return import_module("fastprompt.eval.lmms_eval")

    yield load
    sys.modules.pop("fastprompt.eval.lmms_eval", None)


def test_lmms_eval_gets_the_same_answers(adapter, processor, tmp_path):
    module = adapter()
    files.save_model(tmp_path / "model")
    patched = model_of("patched")
    fastprompt.save(patched, tmp_path / "prompts")
    found = module.manifest()
    assert (found.model_id, found.simple_class_path.rsplit(".", 1)) == (
        "fastprompt",
        ["fastprompt.eval.lmms_eval", "FastPrompt"],
    )
    folders = dict(pretrained=str(tmp_path / "model"), prompts=str(tmp_path / "prompts"))
    model = module.FastPrompt(**folders, batch_size="2", max_batch_size=None, device="cpu")
    assert isinstance(model, lmms) and module.FastPrompt.is_simple
    images = [picture(n) for n in range(5)]
    expected = generate(patched, processor, images, list(TEXTS), max_new_tokens=NEW)

    def visual(doc):
        return [doc["image"]]

    def request(n, **options):
        args = (f"<image>\n{TEXTS[n]}", options, visual, n, "t", "test")
        return SimpleNamespace(args=args)

    lengths = [NEW, NEW, NEW, 2, NEW]
    said = model.generate_until([request(n, max_new_tokens=lengths[n]) for n in range(5)])
    assert [said[n] for n in (0, 1, 2, 4)] == [expected[n] for n in (0, 1, 2, 4)]
    assert said[3] == generate(patched, processor, [images[3]], [TEXTS[3]], max_new_tokens=2)[0]
    stop = expected[0][1]
    cut = model.generate_until([request(0, max_new_tokens=NEW, until=["\n\n", stop])])
    assert cut == [expected[0].split(stop)[0].strip()]
    for options in (dict(do_sample=True), dict(num_beams=2)):
        with pytest.raises(ValueError, match="greedy"):
            model.generate_until([request(0, **options)])

    def score(target):
        args = (TEXTS[2], target, visual, 2, "t", "test")
        return model.loglikelihood([SimpleNamespace(args=args)])[0]

    tokens, greedy = log_likelihoods(patched, processor, images[2], TEXTS[2], ("no",))[0]
    assert score(" no") == score(lambda doc: doc["answer"]) == (-tokens.mean().item(), greedy)
    # lmms-eval's multiple choice takes the least: the likeliest by the mean over its tokens
    losses = [score(f" {option}")[0] for option in OPTIONS]
    question = Question("x", images[2], TEXTS[2], ("yes",), OPTIONS)
    (chosen,) = choices(patched, processor, [question], suffix="")
    assert OPTIONS[losses.index(min(losses))] == chosen["x"]
    with pytest.raises(ValueError, match="t, document 0: want one image, got \\[\\]"):
        model.generate_until([SimpleNamespace(args=("a", {}, lambda d: [], 0, "t", "test"))])
    with pytest.raises(NotImplementedError):
        model.generate_until_multi_round([])


def test_the_adapter_can_be_imported_without_lmms_eval(adapter):
    module = adapter(with_lmms=False)
    with pytest.raises(ModuleNotFoundError, match="pip install lmms-eval"):
        module.FastPrompt("model")
