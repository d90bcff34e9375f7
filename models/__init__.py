"""Network architectures. Nothing here imports anything outside this folder: exporting it is copying
it."""
