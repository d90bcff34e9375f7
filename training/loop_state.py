"""Lightning's counters in a checkpoint, as a function of the optimizer step.

A checkpoint holds the state at the end of a step. Lightning also stores how far it had come in its
own loops, which depends on the number of devices and on when the file was written; resumed as it
stands, a step could begin in the middle of its micro-batches, or a validation be left out. So the
counters are written, and read again, from the step alone.
"""

NOTHING, DUE, DONE = "nothing", "due", "done"  # of the validation that follows a step


def place(loops: dict, *, step: int, accumulate: int, validation: str) -> None:
    """Set the counters of the fit loop to the end of optimizer step `step`, in place.

    validation: NOTHING where none follows this step, DUE where it is still to be run, else DONE.
    """
    fit = loops["fit_loop"]
    batches = step * accumulate
    counts = dict.fromkeys(("ready", "completed", "started", "processed"), batches)
    fit["epoch_loop.batch_progress"] = {
        "total": counts,
        "current": dict(counts),
        "is_last_batch": False,
    }
    # Lightning passes once more through the end of a step after which it validates
    stepped = step if validation == NOTHING else step - 1
    fit["epoch_loop.state_dict"] = {"_batches_that_stepped": stepped}
    begun = int(validation == DUE)  # which Lightning takes up from its first batch
    counts = {"ready": begun, "completed": 0, "started": begun, "processed": 0}
    fit["epoch_loop.val_loop.batch_progress"] = {
        "total": counts,
        "current": dict(counts),
        "is_last_batch": False,
    }


def validation_due(loops: dict) -> bool:
    """Whether the run that wrote these counters had not validated after the step, if it was to."""
    fit = loops["fit_loop"]
    valid = fit["epoch_loop.val_loop.batch_progress"]["total"]
    train = fit["epoch_loop.batch_progress"]["total"]
    return valid["processed"] < valid["started"] or train["completed"] < train["processed"]
