"""The demo: a real LLaVA assembled from small frozen parts that come as ordinary wheels."""
