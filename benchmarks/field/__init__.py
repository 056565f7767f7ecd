"""fastprompt against the field: ``python -m benchmarks.field``.

The same small task, the same data, steps and seed for everybody. Nothing here but the contenders of
fastprompt itself (and `demo`, which writes the demo's task down) imports fastprompt: AdapterHub's
`adapters` runs beside a transformers that fastprompt does not take.
"""
