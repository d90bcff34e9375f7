"""One table of what the parts of gpu.sh found, and what of it is wrong or missed.

    python benchmarks/gpu_table.py FOLDER NAME ...            reads gpu_NAME.json or gpu_NAME.xml
    python benchmarks/gpu_table.py FOLDER NAME ... --check    exit code 1 also for a missed target

A part that did not come to its end is wrong, as a failed test is; what it had measured is shown.
The last line is the JSON of all.
"""

import argparse
import json
import math
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.support.conclusion import conclude

WIDTH = 56  # of the first column
# aims, on an H100
TRAINED = {  # tokens/s
    "bamdlm 16 flex compiled": 300_000,
    "bamdlm 16 flex": 175_000,
    "mdlm sdpa compiled": 500_000,
    "ar sdpa compiled": 480_000,
}
AIMED = "bamdlm 16 flex compiled"
LARGEST_BATCH = 128  # of AIMED, in CAPACITY; cards with more memory take more in proportion
CAPACITY = 77.5  # GiB, of an H100 with 80 GB
SAMPLED = 2_500  # tokens/s, one text after the other
SECONDS_FOR_512 = 7.5  # texts of 1 024 tokens
EFFICIENCY = 0.9  # of ddp and fsdp


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--check", action="store_true", help="exit code 1 for a missed target")
    args = parser.parse_args(argv)
    if not args.folder.is_dir():
        parser.error(f"{args.folder} is no folder")
    found, wrong = gathered(args.folder, args.names)
    on_cpu = found.get("device") == "cpu"
    for name, entry in found.items():
        if not on_cpu and "cases" in entry and "passed" not in entry["cases"].values():
            wrong.append(f"{name}: not one passed")
    if "device" in found:
        print(f"== {found['device']}, torch {found['torch']}")
    if not on_cpu:
        print("aims, of an H100:", *(f"{name} {aim:,} tokens/s;" for name, aim in TRAINED.items()))
        print(f"largest batch of {AIMED} {LARGEST_BATCH} in {CAPACITY} GiB; one text", end=" ")
        print(f"{SAMPLED:,} tokens/s; 512 texts {SECONDS_FOR_512} s; efficiency {EFFICIENCY}")
    for part, lines in LINES.items():
        if part in found:
            print(f"-- {part}")
            for what, figure in lines(found[part]):
                print(f"{what:<{WIDTH}} {figure}")
    for text in wrong:
        print("WRONG:", text)
    found["wrong"] = wrong
    misses = [] if on_cpu else missed(found)
    if on_cpu:
        print("tried on a CPU: nothing here is about a GPU")
    elif not wrong and not misses:
        print("nothing wrong, nothing missed")
    return max(conclude(found, misses, check=args.check), int(bool(wrong)))


def gathered(folder: Path, names: list[str]) -> tuple[dict, list[str]]:
    """{part: what was found} of all files, and what is wrong in it."""
    found, wrong = {}, []
    for name in names:
        entry = read(folder, name)
        if "missed" not in entry:
            wrong.append(f"{name} ended early")
        wrong += entry.pop("wrong", [])
        for part in LINES.keys() & entry.keys():
            found.setdefault(part, {}).update(entry[part])
        found |= {key: entry[key] for key in ("device", "torch") if key in entry}
    steps = found.get("train", {}).items()
    wrong += [f"{name}: {entry['failed']}" for name, entry in steps if "failed" in entry]
    return found, wrong


def missed(found: dict) -> list[str]:
    """Of the aims, in the parts there are."""
    train, sample = found.get("train", {}), found.get("sample", {})
    out = [f"{name}: {entry['left_out']}" for name, entry in train.items() if "left_out" in entry]
    for name, entry in train.items():
        if isinstance(why := entry.get("largest_batch"), str):
            out.append(f"{name}, largest batch: {why}")
    for name, aim in TRAINED.items():
        if (speed := train.get(name, {}).get("tokens_per_second", math.inf)) < aim:
            out.append(f"{name}: {speed:,.0f} tokens/s, wanted {aim:,}")
    aimed = train.get(AIMED, {})
    if "capacity_gib" in aimed:
        fits = aimed["largest_batch"] * CAPACITY / aimed["capacity_gib"]
        if fits < LARGEST_BATCH:
            out.append(f"{AIMED}: batch {fits:.0f} in {CAPACITY} GiB, wanted {LARGEST_BATCH}")
    if "one" in sample and (speed := sample["one"]["tokens_per_second"]) < SAMPLED:
        out.append(f"one text: {speed:,.0f} tokens/s, wanted {SAMPLED:,}")
    if "many" in sample and (seconds := sample["many"]["seconds"][-1]) > SECONDS_FOR_512:
        out.append(f"512 texts: {seconds:.1f} s, wanted {SECONDS_FOR_512}")
    for name, entry in found.get("several", {}).items():
        if "left_out" in entry and not name.startswith("xl"):  # has an aim
            out.append(f"{name}: {entry['left_out']}")
        if (share := entry.get("efficiency", 1)) < EFFICIENCY:
            out.append(f"{name}: efficiency {share:.3f}, wanted {EFFICIENCY}")
    return out


def step_speed(entry: dict) -> str:
    """Of a training step, or why there is none."""
    for reason in ("left_out", "failed"):
        if reason in entry:
            return f"{reason.replace('_', ' ')}: {entry[reason]}"
    line = (
        f"{entry['tokens_per_second']:9,.0f} tokens/s {entry['mfu']:6.1%} of"
        f" {entry['peak'] / 1e12:.3g} TFLOP/s {1000 * entry['seconds']:6.1f} ms"
        f" {entry['memory_gib']:5.1f} GiB"
    )
    if "largest_batch" in entry:
        line += f"  largest batch {entry['largest_batch']}"
    if "capacity_gib" in entry:
        line += f" in {entry['capacity_gib']:.1f} GiB"
    return line


def read(folder: Path, name: str) -> dict:
    """{part: what was found}; without "missed" where it did not come to its end."""
    of_pytest = name.startswith("tests")
    path = folder / f"gpu_{name}.{'xml' if of_pytest else 'json'}"
    try:
        return tests(ElementTree.parse(path), name) if of_pytest else json.loads(path.read_text())
    except (OSError, ElementTree.ParseError):
        return {}


def tests(tree, name: str) -> dict:
    """Of pytest's report: what became of each test, and the largest of each figure noted."""
    figures, cases = {}, {}
    for case in tree.iter("testcase"):
        kinds = [kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None]
        cases[f"{case.get('classname')}::{case.get('name')}"] = (*kinds, "passed")[0]
        for noted in case.iter("property"):
            figure, value = noted.get("name"), float(noted.get("value"))
            figures[figure] = max(value, figures.get(figure, value))
    wrong = [f"test {case}" for case, end in cases.items() if end in ("failure", "error")]
    return {name: {"cases": cases, "figures": figures}, "wrong": wrong, "missed": []}


def lines_of_check(entry: dict):
    for name, found in entry.items():
        verdict = "ok" if found["right"] else "WRONG"
        yield name, f"{found['gap']:.1e} of at most {found['limit']:.0e}  {verdict}"


def lines_of_tests(entry: dict):
    for name, value in entry["figures"].items():
        yield f"{name}, at most", f"{value:.1e}"
    counts = Counter(entry["cases"].values())
    yield "pytest", ", ".join(f"{count} {end}" for end, count in counts.items())


def lines_of_several_tests(entry: dict):
    for name, end in entry["cases"].items():
        yield name.partition("::")[2].removeprefix("test_"), end


def lines_of_train(entry: dict):
    for name, found in entry.items():
        yield name, step_speed(found)


def lines_of_sample(entry: dict):
    if one := entry.get("one"):
        yield "one text after the other", f"{one['tokens_per_second']:9,.0f} tokens/s"
    if many := entry.get("many"):
        speed = f"{many['tokens_per_second']:9,.0f} tokens/s  {many['seconds'][-1]:.2f} s"
        yield "a batch of texts", speed
    if ratio := entry.get("cost_ratio"):
        yield "a block of 8 texts behind 8 L tokens, of one behind 2 L", f"{ratio:.3f} x"


def lines_of_parallel(entry: dict):
    for name, found in entry.items():
        yield name, parallel_speed(found)


def parallel_speed(entry: dict) -> str:
    """Of texts by a rule that may reveal several tokens at once."""
    revealed = entry["tokens_per_evaluation"]
    return f"{entry['tokens_per_second']:9,.0f} tokens/s, {revealed:.1f} tokens an evaluation"


def lines_of_several(entry: dict):
    for name, found in entry.items():
        yield name, speeds(found)


def speeds(found: dict) -> str:
    """Of several devices, together and each alone."""
    if "left_out" in found:
        return f"left out: {found['left_out']}"
    line = (
        f"{found['tokens_per_second']:9,.0f} tokens/s {found['mfu']:6.1%}"
        f" {found['memory_gib']:5.1f} GiB"
    )
    if "alone" in found:
        alone = " ".join(f"{speed:,.0f}" for speed in found["alone"])
        line += f"  efficiency {found['efficiency']:.3f}  each alone {alone}"
    return line


LINES = {
    "check": lines_of_check,
    "tests": lines_of_tests,
    "tests_several": lines_of_several_tests,
    "train": lines_of_train,
    "sample": lines_of_sample,
    "parallel": lines_of_parallel,
    "several": lines_of_several,
}


if __name__ == "__main__":
    sys.exit(main())
