"""The sample_eval run: texts, their figures, one CSV row each (spec §6), a report. Plain arguments only."""
