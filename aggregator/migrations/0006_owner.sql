-- Which process uses the database, where that is at a server: each that opens it counts one up. Whoever lost the
-- connection, and finds another number when it is back, is the owner no more. One row.
CREATE TABLE owner (
    generation BIGINT NOT NULL
);
INSERT INTO owner (generation) VALUES (0);
