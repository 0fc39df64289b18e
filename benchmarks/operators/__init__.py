"""Single operators on the NPU: which of them its compiler takes, at which precision, for which chip."""
