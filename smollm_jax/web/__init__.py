"""The web page of `scripts/app.py`: what may be asked (`requests`), which weights there are (`model_store`), the
answers (`generation_stream`, `responses`), runs as they are written (`run_curves`), and how it all is shown (`page`)
and guarded (`middleware`)."""
