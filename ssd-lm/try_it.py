"""SSD-LM from end to end in a minute, without a network: `python ssd-lm/try_it.py [FOLDER]`.

Makes a tiny model of random weights in the published layout and a tiny judge, draws four samples,
and reports their generative perplexity. The text is noise: it shows the commands, not a model.
"""

import sys
from pathlib import Path

import generate_text
import report_genppl

HERE = Path(__file__).resolve().parent


def main(argv: list[str]) -> int:
    if len(argv) > 1 or (argv and argv[0].startswith("-")):
        print(__doc__)
        return 0 if argv[0] in ("-h", "--help") else 2
    folder = Path(argv[0] if argv else "outputs/ssd-lm-tiny").expanduser()
    if folder.exists() and not folder.is_dir():
        print(f"{folder} is a file: name a folder", file=sys.stderr)
        return 2
    make_models(folder)
    samples = folder / "samples"
    command = ["--model_name_or_path", str(folder / "model"), "--num_samples_to_generate", "4"]
    command += ["--max_seq_length", "100", "--total_t", "25", "--output_dir", str(samples)]
    print("python ssd-lm/generate_text.py", *command)
    status = generate_text.main(command)
    if status:
        return status
    command = [str(samples), "--judge", str(folder / "judge")]
    print("python ssd-lm/report_genppl.py", *command)
    return report_genppl.main(command)


def make_models(folder: Path) -> None:
    """Once: the judge's tokenizer is written last."""
    if (folder / "judge" / "tokenizer_config.json").is_file():
        return
    from ssd_tiny import make_judge, make_tiny
    from transformers.utils import logging

    logging.disable_progress_bar()
    texts = [file.read_text() for file in sorted(HERE.glob("*.md")) + sorted(HERE.glob("*.py"))]
    make_tiny(folder / "model", texts)
    make_judge(folder / "judge", texts)
    print(f"a model and a judge of random weights are in {folder}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
