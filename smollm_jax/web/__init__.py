"""The web page of `smollm app` (`scripts/app.py`): `server` starts it behind `middleware`, `page` lays out its tabs,
`requests` checks what a client sends, `model_store` loads weights, `responses` and `generation_stream` generate texts,
and `run_curves` reads the logs of training runs."""
