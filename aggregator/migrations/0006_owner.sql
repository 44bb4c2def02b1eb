-- Which process uses the database, where that is at a server. One row.
CREATE TABLE owner (
    -- Each process that opens the database counts one up. Whoever then finds another number is the owner no more.
    generation BIGINT NOT NULL,
    -- Transactions of this owner, counted within each: what became of one whose answer was lost is seen here.
    writes     BIGINT NOT NULL
);
INSERT INTO owner (generation, writes) VALUES (0, 0);
