"""The zoo: how far networks that nobody here wrote go, through this package and through plain AIMET."""
