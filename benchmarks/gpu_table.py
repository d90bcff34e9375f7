"""One table of what the parts of gpu.sh found, and what of it is wrong or missed.

    python benchmarks/gpu_table.py FOLDER NAME ...            reads gpu_NAME.json or gpu_NAME.xml
    python benchmarks/gpu_table.py FOLDER NAME ... --check    exit code 1 also for a missed target

A part whose file is not there ended early, which is wrong like a failed test. The last line is the
JSON of all.
"""

import argparse
import json
import sys
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.conclusion import conclude

WIDTH = 56  # of the first column
# aims, on an H100
TRAINED = 250_000  # tokens/s, bamdlm S = 16
SAMPLED = 1_500  # tokens/s, one text after the other
SECONDS_FOR_512 = 12  # texts of 1 024 tokens
EFFICIENCY = 0.9  # of ddp


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--check", action="store_true", help="exit code 1 for a missed target")
    args = parser.parse_args(argv)
    found, wrong = {}, []
    for name in args.names:
        entry = read(args.folder, name)
        if entry is None:
            wrong.append(f"{name} ended early")
            continue
        wrong += entry.pop("wrong", [])
        for part in LINES.keys() & entry.keys():
            found.setdefault(part, {}).update(entry[part])
        if "device" in entry:
            found["device"] = entry["device"]
    for part, lines in LINES.items():
        if part in found:
            print(f"-- {part}")
            for what, figure in lines(found[part]):
                print(f"{what:<{WIDTH}} {figure}")
    for text in wrong:
        print("WRONG:", text)
    found["wrong"] = wrong
    misses = missed(found) if found.get("device") != "cpu" else []
    return max(conclude(found, misses, check=args.check), int(bool(wrong)))


def missed(found: dict) -> list[str]:
    """Of the aims, in the parts there are."""
    out, train, sample = [], found.get("train"), found.get("sample")
    if train is not None:
        ours = (entry for name, entry in train.items() if "bamdlm 16" in name)
        speeds = (entry.get("tokens_per_second", 0) for entry in ours)
        if (speed := max(speeds, default=0)) < TRAINED:
            out.append(f"training bamdlm 16: {speed:,.0f} tokens/s, wanted {TRAINED:,}")
    if sample is not None:
        if (speed := sample["one"]["tokens_per_second"]) < SAMPLED:
            out.append(f"one text: {speed:,.0f} tokens/s, wanted {SAMPLED:,}")
        if (seconds := sample["many"]["seconds"][-1]) > SECONDS_FOR_512:
            out.append(f"512 texts: {seconds:.1f} s, wanted {SECONDS_FOR_512}")
    for count, entry in found.get("several", {}).items():
        if (share := entry["efficiency"]) < EFFICIENCY:
            out.append(f"ddp on {count}: efficiency {share:.3f}, wanted {EFFICIENCY}")
    return out


def step_speed(entry: dict) -> str:
    """Of a training step."""
    if "left_out" in entry:
        return f"left out: {entry['left_out']}"
    batch = entry.get("largest_batch")
    return (
        f"{entry['tokens_per_second']:9,.0f} tokens/s {entry['mfu']:6.1%} MFU"
        f" {1000 * entry['seconds']:6.1f} ms {entry['memory_gib']:5.1f} GiB"
        + (f"  largest batch {batch}" if batch else "")
    )


def read(folder: Path, name: str) -> dict | None:
    """{part: what was found}; None where nothing was left."""
    of_pytest = name.startswith("tests")
    path = folder / f"gpu_{name}.{'xml' if of_pytest else 'json'}"
    if not path.exists():
        return None
    return tests(ElementTree.parse(path), name) if of_pytest else json.loads(path.read_text())


def tests(tree, name: str) -> dict:
    """Of pytest's report: how many passed, which did not, and the largest of each figure noted."""
    figures, failed, passed, skipped = {}, [], 0, 0
    for case in tree.iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
        for noted in case.iter("property"):
            figure, value = noted.get("name"), float(noted.get("value"))
            figures[figure] = max(value, figures.get(figure, value))
    entry = {"passed": passed, "failed": len(failed), "skipped": skipped, "figures": figures}
    return {name: entry, "wrong": [f"test {each}" for each in failed]}


def lines_of_check(entry: dict):
    for name, found in entry.items():
        verdict = "ok" if found["right"] else "WRONG"
        yield name, f"{found['gap']:.1e} of at most {found['limit']:.0e}  {verdict}"


def lines_of_tests(entry: dict):
    for name, value in entry["figures"].items():
        yield f"{name}, at most", f"{value:.1e}"
    counts = (f"{entry[key]} {key}" for key in ("passed", "failed", "skipped"))
    yield "pytest", ", ".join(counts)


def lines_of_train(entry: dict):
    yield "matrix product", f"{entry['peak'] / 1e12:9.0f} TFLOP/s"
    for name, found in entry.items():
        if name != "peak":
            aim = f"  (aim {TRAINED:,})" if name == "bamdlm 16 flex compiled" else ""
            yield name, step_speed(found) + aim


def lines_of_sample(entry: dict):
    speeds = {
        name: f"{entry[name]['tokens_per_second']:9,.0f} tokens/s" for name in ("one", "many")
    }
    yield "one text after the other", f"{speeds['one']}  (aim {SAMPLED:,})"
    seconds = f"{entry['many']['seconds'][-1]:.2f} s"
    yield "a batch of texts", f"{speeds['many']}  {seconds}  (aim {SECONDS_FOR_512} s for 512)"
    yield "a block of 8 texts behind 8 L tokens, of one behind 2 L", f"{entry['cost_ratio']:.3f} x"


def lines_of_several(entry: dict):
    for count, found in entry.items():
        speed = f"{found['tokens_per_second']:9,.0f} tokens/s"
        yield f"ddp on {count}", f"{speed}  efficiency {found['efficiency']:.3f} (aim {EFFICIENCY})"


LINES = {
    "check": lines_of_check,
    "tests": lines_of_tests,
    "tests_several": lines_of_tests,
    "train": lines_of_train,
    "sample": lines_of_sample,
    "several": lines_of_several,
}


if __name__ == "__main__":
    sys.exit(main())
