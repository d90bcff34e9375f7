"""What must hold between the settings of mode=sample_eval and of mode=demo."""

from collections.abc import Iterator
from pathlib import Path

from settings.defaults import has_package
from settings.rules.files import is_lost
from settings.schema import Config
from settings.tables import algorithms


def sampling(config: Config) -> Iterator[str]:
    if config.mode != "sample_eval":
        return
    sampling, name = config.sampling, config.algo.name
    if "steps" not in algorithms()[name]["can"] and sampling.steps is not None:
        yield f"sampling.steps={sampling.steps} does not fit algo={name}, which has its own"
    if not sampling.first_hitting and sampling.steps == "first_hitting":
        yield "sampling.first_hitting=False contradicts sampling.steps=first_hitting"
    if sampling.prompt is not None and sampling.prompts is not None:
        yield "sampling.prompt and sampling.prompts are both set: choose one"
    if sampling.infill and sampling.prompt is None and sampling.prompts is None:
        yield "sampling.infill=True needs sampling.prompt or sampling.prompts with [MASK] in it"
    if sampling.prompts is not None:
        path = Path(sampling.prompts)
        if not sampling.prompts or not path.exists():
            yield f"sampling.prompts={sampling.prompts} does not exist"
        elif not path.is_file():
            kind = "a folder" if path.is_dir() else "no regular file"
            yield f"sampling.prompts={path} is {kind}: name a .txt or .jsonl file"
        elif path.suffix not in (".txt", ".jsonl"):
            yield f"sampling.prompts={path} must be a .txt or .jsonl file"
        elif path.stat().st_size == 0:
            yield f"sampling.prompts={path} is empty"
    if sampling.trajectory is not None and not sampling.trajectory.endswith(".html"):
        yield f"sampling.trajectory={sampling.trajectory} must be the name of an .html file"
    judge = config.eval.gen_ppl_eval_model_name_or_path
    if judge is not None and is_lost(judge):
        yield f"eval.gen_ppl_eval_model_name_or_path={judge} does not exist (null: no judge)"


def demo(config: Config) -> Iterator[str]:
    if config.mode != "demo":
        return
    if not config.demo.host:
        yield "demo.host= is empty: 127.0.0.1 is this machine alone, 0.0.0.0 is for all others too"
    if not has_package("gradio"):
        yield (
            "mode=demo: the package gradio is not installed; run"
            " pip install -r requirements-demo.txt"
        )
