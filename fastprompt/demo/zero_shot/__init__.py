"""Is a prompt-tuned model right where it was not trained?

``python -m fastprompt.demo zero-shot``.
"""
