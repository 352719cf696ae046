"""Measuring bundles through the public API of `deixis`."""
