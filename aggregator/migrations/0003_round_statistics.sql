-- How a round moved the model, beside delta_norm and update_norm. NULL for rounds that an older version committed.

-- L2 norms of the model that the round made, and of the outer optimizer's momentum after it (NULL where it has
-- none).
ALTER TABLE rounds ADD COLUMN parameter_norm DOUBLE PRECISION;
ALTER TABLE rounds ADD COLUMN momentum_norm DOUBLE PRECISION;
-- Cosine of the angle between the round's update and the one before; NULL in the first round, and where one of
-- them is zero.
ALTER TABLE rounds ADD COLUMN update_cosine DOUBLE PRECISION;
-- Weighted mean of the squared distances of the averaged deltas to their mean, as a multiple of the mean's squared
-- norm, from contributions.delta_norm; NULL where the mean is zero.
ALTER TABLE rounds ADD COLUMN spread DOUBLE PRECISION;
