"""The server of OpenAI's API: `fields` checks requests, `answers` writes responses, `app` connects both to the slots,
and `guard` refuses what no client of it may send."""
