"""CLIP and SigLIP: a tower for pictures and one for texts, trained on pairs alone."""
