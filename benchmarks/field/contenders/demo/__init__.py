"""What users write to tune the demo's LLaVA, whose projector trains too.

It trains in float32, as fastprompt's does: AdamW's running mean of squares does not decay in
bfloat16. Elsewhere than in fastprompt that takes two hooks.
"""
