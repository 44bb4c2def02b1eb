-- Deltas that count in a later round than the one that they were trained for.

-- Immutable. By how many rounds: the delta of contributions.round is averaged in round + age.
ALTER TABLE contributions ADD COLUMN age BIGINT NOT NULL DEFAULT 0;
