-- Runs that start from a checkpoint.

-- Immutable. What the model that the run starts from is called, and the digest of its flat vector as it came;
-- NULL where the seed gave the initial weights.
ALTER TABLE runs ADD COLUMN start_origin TEXT;
ALTER TABLE runs ADD COLUMN start_digest TEXT;

-- Models that are being uploaded for runs that do not exist yet; their chunks are in the spool. A row is there
-- before the first chunk, and goes after the last: what no run was made of is found by it.
CREATE TABLE start_uploads (
    run        TEXT PRIMARY KEY NOT NULL,
    -- Changes while chunks come.
    touched_ms BIGINT NOT NULL
);
