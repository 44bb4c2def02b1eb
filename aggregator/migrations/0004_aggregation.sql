-- What the run's rule of aggregation did with a delta, set when its round commits; NULL while the round is open,
-- where the rule does not look at it, and for rounds that an older version committed. Where a rule does not select a
-- delta, its weight is 0.

-- L2 norm of what the delta decodes to, as the aggregator found it.
ALTER TABLE contributions ADD COLUMN measured_norm DOUBLE PRECISION;
-- By what it was scaled: 0 to 1.
ALTER TABLE contributions ADD COLUMN clip DOUBLE PRECISION;
-- Whether it was averaged: 0 or 1.
ALTER TABLE contributions ADD COLUMN selected BIGINT;

-- One row per committed round; immutable. None for rounds that an older version committed.
CREATE TABLE round_tensors (
    run   TEXT NOT NULL REFERENCES runs (name),
    round BIGINT NOT NULL,
    -- L2 norms of each tensor of the model, in the manifest's order, as JSON: a list of objects with "delta" (of the
    -- averaged delta), "momentum" (after the round; null where the outer optimizer has none) and "parameters" (new).
    norms TEXT NOT NULL,
    PRIMARY KEY (run, round)
);
