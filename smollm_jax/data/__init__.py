"""From text files to batches, without a framework: `text` reads documents, `plan` divides them into work units,
`prepare` tokenizes them, `token_file` stores tokens, `mixture` joins data sets, `batches` cuts a step's rows."""
