"""The web page of `scripts/app.py`: what may be asked (`ask`), which weights there are (`shelf`), the answers
(`writing`, `answers`), runs as they are written (`runs`), and how it all is shown (`page`) and guarded (`guard`)."""
