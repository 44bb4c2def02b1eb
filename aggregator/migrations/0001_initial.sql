-- Consort's database: what the aggregator must not forget. Models, deltas and tokenizers are files; what
-- they hold is here only as digests.
--
-- Conventions: names are checked before they come here; digests are BLAKE3 in hexadecimal; *_ms is
-- milliseconds since 1970-01-01 UTC; losses are nats per token; counters are never negative. The SQL keeps
-- to what SQLite and PostgreSQL both understand.

-- One row per run, written when it is created and never removed.
CREATE TABLE runs (
    -- Immutable. Unique on this aggregator.
    name             TEXT PRIMARY KEY NOT NULL,
    -- Immutable. The specification exactly as given, and its digest: what sites compare.
    spec_toml        TEXT NOT NULL,
    spec_digest      TEXT NOT NULL,
    -- Immutable. Digest of the model's tensor manifest, derived from the specification.
    manifest_digest  TEXT NOT NULL,
    -- Immutable. Digest of runs/<name>/tokenizer.json.
    tokenizer_digest TEXT NOT NULL,
    -- Immutable. For lists: name of the architecture, length of the flat vector.
    architecture     TEXT NOT NULL,
    parameters       BIGINT NOT NULL,
    -- Changes with every step of the round engine: its whole state. Only the engine reads it.
    state_json       TEXT NOT NULL,
    -- Change when a round commits, together with its row in rounds: the newest model version and the digest
    -- of its flat vector. Only ever grows, by one: this is what makes a version real.
    version          BIGINT NOT NULL,
    version_digest   TEXT NOT NULL,
    -- Immutable.
    created_ms       BIGINT NOT NULL,
    -- Each set once: at the first start; when the run finishes or is aborted.
    started_ms       BIGINT,
    finished_ms      BIGINT,
    -- Grow with traffic: model payload sent to and received from sites. Not exact across a crash.
    bytes_down       BIGINT NOT NULL DEFAULT 0,
    bytes_up         BIGINT NOT NULL DEFAULT 0
);

-- One row per committed round; immutable.
CREATE TABLE rounds (
    run          TEXT NOT NULL REFERENCES runs (name),
    -- From 1, without gaps; also the version that the round made.
    round        BIGINT NOT NULL,
    -- When its first attempt began, and when it was committed.
    started_ms   BIGINT NOT NULL,
    committed_ms BIGINT NOT NULL,
    -- Times that sites were selected for it.
    attempts     BIGINT NOT NULL,
    -- The run's cumulative local step before the round: its place on the learning-rate schedule.
    first_step   BIGINT NOT NULL,
    -- Tokens trained, all contributors.
    tokens       BIGINT NOT NULL,
    -- Weighted mean over the contributors.
    train_loss   DOUBLE PRECISION NOT NULL,
    -- L2 norms of the averaged delta, and of the update that the outer optimizer made of it.
    delta_norm   DOUBLE PRECISION NOT NULL,
    update_norm  DOUBLE PRECISION NOT NULL,
    -- Model payload moved for the round.
    bytes_down   BIGINT NOT NULL,
    bytes_up     BIGINT NOT NULL,
    -- Digest of the model that the round made.
    digest       TEXT NOT NULL,
    PRIMARY KEY (run, round)
);

-- One row per accepted delta, written when it is accepted; a round that is still open has rows here and
-- none in rounds.
CREATE TABLE contributions (
    run           TEXT NOT NULL REFERENCES runs (name),
    round         BIGINT NOT NULL,
    site          TEXT NOT NULL,
    -- Set when the round commits: the share of the average, 0 to 1. Stays NULL if the delta was not averaged.
    weight        DOUBLE PRECISION,
    -- The rest is immutable, as the site reported it and the upload showed it.
    tokens        BIGINT NOT NULL,
    steps         BIGINT NOT NULL,
    train_loss    DOUBLE PRECISION NOT NULL,
    train_seconds DOUBLE PRECISION NOT NULL,
    delta_norm    DOUBLE PRECISION NOT NULL,
    -- Encoded payload.
    bytes         BIGINT NOT NULL,
    -- How the delta was encoded, by its name in specifications.
    encoding      TEXT NOT NULL,
    -- Digest over the delta's chunk digests, in order.
    delta_digest  TEXT NOT NULL,
    accepted_ms   BIGINT NOT NULL,
    PRIMARY KEY (run, round, site)
);
-- For a site's history over all runs, newest first.
CREATE INDEX contributions_by_site ON contributions (site, accepted_ms);

-- Held-out loss of a version at a site; the newest report replaces an older one.
CREATE TABLE evaluations (
    run        TEXT NOT NULL REFERENCES runs (name),
    version    BIGINT NOT NULL,
    site       TEXT NOT NULL,
    loss       DOUBLE PRECISION NOT NULL,
    -- Tokens predicted, and UTF-8 bytes of the text that they encode.
    tokens     BIGINT NOT NULL,
    text_bytes BIGINT NOT NULL,
    PRIMARY KEY (run, version, site)
);

-- Published checkpoints; a row goes when its directory is retired.
CREATE TABLE checkpoints (
    run        TEXT NOT NULL REFERENCES runs (name),
    version    BIGINT NOT NULL,
    -- Directory on the aggregator's machine.
    path       TEXT NOT NULL,
    -- Total of its files.
    bytes      BIGINT NOT NULL,
    created_ms BIGINT NOT NULL,
    -- Digest of the model's flat vector.
    digest     TEXT NOT NULL,
    PRIMARY KEY (run, version)
);

-- Every site that ever joined.
CREATE TABLE clients (
    site             TEXT PRIMARY KEY NOT NULL,
    -- Immutable.
    first_seen_ms    BIGINT NOT NULL,
    -- Change with each join: when, on what device, with what software.
    last_seen_ms     BIGINT NOT NULL,
    device           TEXT NOT NULL,
    software_version TEXT NOT NULL
);

-- What a site has prepared for a run: its last report replaces an older one.
CREATE TABLE run_sites (
    run             TEXT NOT NULL REFERENCES runs (name),
    site            TEXT NOT NULL,
    train_tokens    BIGINT NOT NULL,
    held_out_tokens BIGINT NOT NULL,
    documents       BIGINT NOT NULL,
    PRIMARY KEY (run, site)
);

-- What happened, in sentences; the newest of each run (see EVENTS_MAX in the code).
CREATE TABLE events (
    run     TEXT NOT NULL REFERENCES runs (name),
    -- Counts from 1 within the run; never used twice.
    id      BIGINT NOT NULL,
    time_ms BIGINT NOT NULL,
    text    TEXT NOT NULL,
    PRIMARY KEY (run, id)
);
