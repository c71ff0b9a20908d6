CREATE TABLE records (
    namespace TEXT NOT NULL,
    id        TEXT NOT NULL,
    session   TEXT NOT NULL,
    created   REAL NOT NULL,
    said      TEXT NOT NULL,
    PRIMARY KEY (namespace, id)
) STRICT, WITHOUT ROWID;
CREATE INDEX records_created ON records (created);
CREATE INDEX records_session ON records (namespace, session);
PRAGMA user_version = 1;
