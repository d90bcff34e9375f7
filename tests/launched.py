"""main.py with a fault, for processes that torchrun or Lightning start: `FAULT` in the environment
says which, and FAULT_RANK of which rank.

    raises, SIGKILL   in the third step
    late              with its texts
    waits             none: steps are recorded as CUDA graphs (not with fsdp), and asking the device
                      for anything is an error from the sixth to the last but one
"""

import os
import signal
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

import torch  # noqa: E402  needs the path, as the others do

import main  # noqa: E402
from diffusion import Diffusion  # noqa: E402
from sampling.run import SamplingRun  # noqa: E402
from training import health  # noqa: E402


def patch() -> None:
    fault = os.environ["FAULT"]
    health.TIDY_SECONDS = 1
    if fault == "waits":
        record_and_wait_for_nothing()
    elif os.environ.get("LOCAL_RANK", "0") != os.environ["FAULT_RANK"]:
        return
    elif fault == "late":
        write = SamplingRun._write
        SamplingRun._write = lambda self, rows: (time.sleep(3), write(self, rows))
    else:
        fail_in_the_third_step(fault)


def fail_in_the_third_step(fault: str) -> None:
    real, calls = Diffusion.training_step, []

    def step(self, batch, index):
        calls.append(index)
        if len(calls) == 3 and fault == "raises":
            raise ZeroDivisionError("the fault of one rank")
        if len(calls) == 3:
            print("the fault of one rank", flush=True)
            os.kill(os.getpid(), getattr(signal, fault))
        return real(self, batch, index)

    Diffusion.training_step = step


def record_and_wait_for_nothing() -> None:
    real_start, real_step = Diffusion.on_fit_start, Diffusion.training_step
    real_validation, real_end = Diffusion.on_validation_model_eval, Diffusion.on_train_end

    def start(self):  # recorded without the compiler, which takes long
        self.backbone.compiled = True
        real_start(self)
        self.backbone.compiled = False

    def step(self, batch, index):  # the last one ends with a checkpoint
        polls = [each._poll for each in self.trainer.callbacks if hasattr(each, "_poll")]
        assert polls
        assert all((each.coming is None) == (index == 0) for each in polls)
        torch.cuda.set_sync_debug_mode("error" if 4 < index < 9 else "default")
        return real_step(self, batch, index)

    def validation(self):  # before the callbacks, which log what is done
        torch.cuda.set_sync_debug_mode("default")
        real_validation(self)

    def end(self):
        recorded = self.graphed is not None and self.graphed.graph is not None
        assert self.health.late
        print(f"its steps were recorded: {recorded}\n", end="", flush=True)  # in one piece
        real_end(self)

    Diffusion.on_fit_start, Diffusion.training_step = start, step
    Diffusion.on_validation_model_eval, Diffusion.on_train_end = validation, end


def run(arguments: list[str]) -> int:
    code = main.main(arguments)
    if os.environ["FAULT"] == "late" and os.environ.get("LOCAL_RANK", "0") == "0":
        print("at the end the report is", "there" if os.path.exists("texts.json") else "missing")
    return code


if __name__ == "__main__":
    patch()
    sys.exit(run(sys.argv[1:]))
