"""A whole federation in one thread, on a clock that only jumps: one seed, one history.

Real, the very code that is shipped:
    the pure workflow; `RunActor`, `Ledger`, `Shelf`, `Runs`, `Retention`, `ClientManager`,
    `RequestRelay`, `TrainingService` and both FL servicers; `ServerControl` with validation on
    demand, staging and who takes part in runs at work; `FileBlobStore` on both sides;
    `TaskLoop`, `Spool`, `SiteRuns`, `SiteRun`, `Session`, `RequestAgent`, the loops of
    `SiteClient`, the sites' states (`client.state`), `files.durable`, model files, codecs on both
    sides, and aggregation with its optimisers.
Modelled:
    event loop and clock (`world`), file systems (`disk`, `system`), gRPC: connections, calls and
    blob transfers (`network`), the state store: one log, group commit, durable before its future
    resolves (`server`), tokens but no certificates or signatures, and the job's process: training
    is a digest of model, seed, site and committed state (`site`).
Not here:
    consoles and the questions that they have sites answer before (signed commands), the audit, TLS,
    and the order of bytes in SQLite's own files.

`history` plays one seed, `faults` draws what goes wrong and what operators do, `operators` does
the latter; `invariants` says what must hold, with `attendance` of who takes part, `validations` of
matrices and `steps` of numbers and staged jobs; `pool` plays many, `mutations` breaks the program
to prove that this is found.
"""
