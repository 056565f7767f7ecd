"""fastprompt's models in lmms-eval (github.com/EvolvingLMMs-Lab/lmms-eval).

    lmms-eval --model fastprompt --model_args pretrained=MODEL,prompts=FOLDER --tasks pope

lmms-eval finds `manifest` by the entry point "lmms_eval.models". Without lmms-eval this module can
be imported, and its class not be made.
"""

from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from fastprompt.eval.generate import generate
from fastprompt.eval.loading import load_model
from fastprompt.eval.rank import log_likelihoods

try:
    from lmms_eval.api.model import lmms
except ModuleNotFoundError:
    lmms = None


def manifest() -> Any:
    """What lmms-eval's registry asks an entry point for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("fastprompt", simple_class_path=f"{__name__}.FastPrompt")


class FastPrompt(lmms or object):
    """A LLaVA-like model with prompts: one image a question, greedy answers, log-likelihoods.

    Args:
        pretrained: hub id or folder.
        prompts: folder of `fastprompt.save`; projector: a file; "" for none.
        batch_size, device: as lmms-eval gives them.
        four_bit, dtype, chat_template, template: as ``fastprompt eval`` has them.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        prompts: str = "",
        projector: str = "",
        batch_size: int | str = 1,
        device: str = "cuda",
        four_bit: bool = False,
        dtype: str = "auto",
        chat_template: str = "",
        template: str = "",
        max_batch_size: int | None = None,  # given to every model; batches are not searched for
    ) -> None:
        if lmms is None:
            raise ModuleNotFoundError("want lmms-eval installed (pip install lmms-eval)")
        super().__init__()
        self.batch_size = int(batch_size)
        self._model, self._processor = load_model(
            pretrained,
            prompts=Path(prompts) if prompts else None,
            projector=Path(projector) if projector else None,
            chat_template=Path(chat_template) if chat_template else None,
            template=template or None,
            four_bit=four_bit,
            dtype=dtype,
            device=device,
        )
        self._model.eval()

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Greedy answers, cut at the first of a request's ``until``."""
        said: list[str] = []
        for _, alike in groupby(requests, key=lambda r: r.args[1].get("max_new_tokens", 64)):
            alike = list(alike)
            for start in tqdm(range(0, len(alike), self.batch_size)):
                said += self._generate([r.args for r in alike[start : start + self.batch_size]])
        return said

    def _generate(self, part: list[tuple]) -> list[str]:
        options = [args[1] for args in part]
        for given in options:
            if given.get("do_sample") or given.get("num_beams", 1) != 1:
                raise ValueError(f"want greedy answers (do_sample=False, one beam), got {given}")
        new = generate(
            self._model,
            self._processor,
            [self._image(doc_to_visual, *doc) for _, _, doc_to_visual, *doc in part],
            [_text(args[0]) for args in part],
            max_new_tokens=options[0].get("max_new_tokens", 64),
        )
        return [_cut(text, given.get("until")) for text, given in zip(new, options, strict=True)]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """The loss of each continuation (the mean of its tokens' negative log-likelihoods, low is
        likely), and whether it is the greedy one.

        In spite of the name: lmms-eval's models return their loss here, and its multiple choice
        takes the option of the least.
        """
        return [self._loglikelihood(*r.args) for r in tqdm(requests)]

    def _loglikelihood(self, context, target, doc_to_visual, doc_id, task, split):
        if callable(target):
            target = target(self.task_dict[task][split][doc_id])
        image = self._image(doc_to_visual, doc_id, task, split)
        args = self._model, self._processor, image, _text(context)
        tokens, greedy = log_likelihoods(*args, (target.strip(),))[0]
        return -tokens.mean().item(), greedy

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Not served: prompts are tuned and evaluated on one question about one image."""
        raise NotImplementedError("want a task of one round; this model answers one question")

    def _image(self, doc_to_visual: Any, doc_id: int, task: str, split: str) -> Image.Image:
        visuals = doc_to_visual(self.task_dict[task][split][doc_id])
        if len(visuals) != 1 or not isinstance(visuals[0], Image.Image):
            raise ValueError(f"{task}, document {doc_id}: want one image, got {visuals}")
        return visuals[0].convert("RGB")


def _text(context: str) -> str:
    return context.replace("<image>", "").strip()  # the chat template has the image's place


def _cut(text: str, until: str | list[str] | None) -> str:
    for stop in [until] if isinstance(until, str) else until or []:
        text = text.split(stop)[0]
    return text.strip()
