"""Experiments: each file has `get_config(preset) -> ConfigDict`; dimo_jax/run_config.py says what each key means."""
