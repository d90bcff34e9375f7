"""lm-eval's own command line with the models of this project as --model bamdlm.

    pip install -r requirements-lm-eval.txt
    python scripts/lm_eval.py --model bamdlm --model_args checkpoint=last.ckpt,likelihood=greedy \\
        --tasks lambada_openai --batch_size 16

model_args: checkpoint (a .ckpt, an exported folder or a hub id), likelihood (exact in blocks of at
most 10 tokens, else counts; see docs/evaluation.md), draws, max_passes, algo, block_size,
tokenizer, use_ema, add_bos_token (true but for ar), and for generation steps, k, threshold and seed
of the sampler. A prompt's last block keeps its clean tokens, and only what follows is masked, as
when the model writes. Under torchrun the processes share the requests.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # this file has the name of the package it starts

try:
    from lm_eval.__main__ import cli_evaluate
except ModuleNotFoundError as missing:
    print(f"{missing}: pip install -r {ROOT / 'requirements-lm-eval.txt'}", file=sys.stderr)
    sys.exit(2)
import torch  # noqa: E402
from lm_eval.api.model import TemplateLM  # noqa: E402
from lm_eval.api.registry import register_model  # noqa: E402
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: E402
from tqdm import tqdm  # noqa: E402

from samplers.request import TextRequest  # noqa: E402
from samplers.writing import check, generate  # noqa: E402
from sampling.notebook import load  # noqa: E402

GENERATED_TOKENS = 256  # where a task does not say


@register_model("bamdlm", "bd3lm")
class BlockDiffusionLM(TemplateLM):
    """loglikelihood is the sum over the continuation, is_greedy whether the greedy rule (one
    position of greatest probability at a time) writes it."""

    def __init__(
        self,
        checkpoint: str,
        likelihood: str | None = None,
        draws: int = 1,
        max_passes: int = 1024,
        batch_size: int | str = 16,
        max_batch_size: int | None = None,
        device: str | None = None,
        add_bos_token: bool | None = None,
        **options,
    ):
        super().__init__()
        self._rank, self._world_size = join_group()
        self._device = torch.device(device if device and device != "cuda:0" else best_device())
        loading = {name: options.pop(name) for name in LOADING & options.keys()}
        self.model = load(str(checkpoint), device=self._device, **loading, **options)
        self.scorer = self.model.scorer
        self.draws = int(draws)
        self.chosen = self.scorer.parse(likelihood, self.draws, int(max_passes))
        self.batch_size = 16 if str(batch_size).startswith("auto") else int(batch_size)
        self.add_bos = self.model.writes != "ar" if add_bos_token is None else add_bos_token

    @property
    def eot_token_id(self) -> int:
        return self.model.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.model.tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens=None, **kwargs) -> list[int]:
        return list(self.model.tokenizer.encode(string)) if string else []

    def given(self, context: list[int]) -> list[int]:
        """The context behind BOS, where texts begin with it."""
        bos = [self.prefix_token_id]
        return context if not self.add_bos or context[:1] == bos else bos + context

    def cut(self, context: list[int], room: int) -> list[int]:
        """Its last tokens; a BOS that `given` put before them stays."""
        if self.add_bos and len(context) > room > 1:
            return context[:1] + context[1 - room :]
        return context[-room:]

    @property
    def tokenizer_name(self) -> str:
        return str(self.model.tokenizer.fingerprint)

    @property
    def max_length(self) -> int:
        """Tokens of a text; ar predicts one more."""
        return self.scorer.length + (self.model.writes == "ar")

    def get_model_info(self) -> dict:
        """What the report says of the model."""
        kind = self.chosen.kind
        return {
            "model_num_parameters": sum(p.numel() for p in self.scorer.backbone.parameters()),
            "likelihood": self.chosen.label,
            "likelihood_is": "exact" if self.scorer.block_size == 1 else kind.law,
            "likelihood_draws": self.draws if kind.sampled else 1,
            "algo": self.model.writes,
            "block_size": self.scorer.block_size,
        }

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs):
        """Requests ((context, continuation), context ids, continuation ids), in batches of similar
        length; what does not fit is cut off at the left of the context."""
        texts, given = [], []
        for _, context, continuation in requests:
            context = self.given(list(context))
            room = self.max_length - len(continuation)
            if room < 1:
                raise ValueError(
                    f"a continuation has {len(continuation)} tokens, the model takes"
                    f" {self.max_length} with what stands before"
                )
            kept = self.cut(context, room)
            texts.append(kept + list(continuation))
            given.append(len(kept))
        name = f"likelihood={self.chosen.label}"
        with tqdm(total=len(texts), desc=name, disable=disable_tqdm) as bar:
            found = self.scorer.score(
                texts,
                given,
                self.chosen,
                draws=self.draws,
                greedy=True,
                batch_size=self.batch_size,
                tick=bar.update,
            )
        answers = [(-score.total, score.greedy) for score in found]
        for (strings, _, _), answer in zip(requests, answers, strict=True):
            if strings is not None:
                self.cache_hook.add_partial("loglikelihood", strings, answer)
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """In windows of the model's length, each token scored once; every window begins with the
        token before it, the first with BOS."""
        windows, owners = [], []
        for number, (string,) in enumerate(request.args for request in requests):
            pairs = get_rolling_token_windows(
                self.tok_encode(string), self.prefix_token_id, self.max_length - 1 - self.add_bos, 1
            )
            for context, continuation in map(make_disjoint_window, pairs):
                windows.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        answers = self._loglikelihood_tokens(windows, disable_tqdm)
        for number, (value, _) in zip(owners, answers, strict=True):
            totals[number] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Texts of this project's samplers, cut at the first stop string or EOS. Without do_sample
        every token is the likeliest one."""
        answers = []
        for request in tqdm(requests, desc="generate_until", disable=disable_tqdm):
            prompt, options = request.args
            answer = self._continued(prompt, options)
            self.cache_hook.add_partial("generate_until", request.args, answer)
            answers.append(answer)
        return answers

    def _continued(self, prompt: str, options: dict) -> str:
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        sampled = options.get("do_sample", False)
        wanted = int(options.get("max_gen_toks", GENERATED_TOKENS))
        size, algo = self.scorer.block_size, self.model.writes
        room = self.scorer.length - min(wanted, self.scorer.length - 1)
        ids = self.given(self.tok_encode(prompt)) or [self.prefix_token_id]
        ids = self.cut(ids, room)
        length = -(-(len(ids) + wanted) // size) * size if algo == "bamdlm" else len(ids) + wanted
        length = min(length, self.scorer.length)
        params = self.model.params.changed(
            length=length,
            temperature=float(options.get("temperature", 1.0)) if sampled else 0.0,
            top_k=int(options.get("top_k") or 0),
            nucleus_p=float(options.get("top_p", 1.0)),
            batch_size=1,
        )
        check(params, algo)
        request = [TextRequest(0, tuple(ids))]
        groups = generate(algo, self.model.denoise, request, params, device=self._device)
        ((sample,),) = [group for group in groups if group]
        made = sample.tokens.tolist()[len(ids) : len(ids) + wanted]
        if self.eot_token_id in made:
            made = made[: made.index(self.eot_token_id)]
        text = self.model.tokenizer.decode(made)
        return min((text.split(stop)[0] for stop in until if stop), key=len, default=text)

    # lm-eval asks for these three where there are several processes

    def all_gather(self, tensor):
        parts = [torch.zeros_like(tensor.cpu()) for _ in range(self.world_size)]
        torch.distributed.all_gather(parts, tensor.cpu())
        return torch.stack(parts)

    def gather_object(self, obj, dst: int = 0):
        found = [None] * self.world_size if self.rank == dst else None
        torch.distributed.gather_object(obj, found, dst=dst)
        return found

    def barrier(self) -> None:
        torch.distributed.barrier()


LOADING = {"tokenizer", "algo", "block_size", "use_ema", "cache_dir"}


def join_group() -> tuple[int, int]:
    """(rank, processes) of torchrun; they exchange requests and results only."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    return (torch.distributed.get_rank(), size) if size > 1 else (0, 1)


def best_device() -> torch.device:
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")))


if __name__ == "__main__":
    cli_evaluate()
