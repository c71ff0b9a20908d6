CREATE TABLE agents (
    id INTEGER PRIMARY KEY,
    namespace TEXT NOT NULL,
    agent_id TEXT NOT NULL,
    type TEXT NOT NULL,
    template TEXT,
    model TEXT NOT NULL,
    created REAL NOT NULL,
    last_access REAL NOT NULL,
    -- Its system prompt and metadata as JSON, sealed where the store is encrypted.
    about TEXT NOT NULL,
    UNIQUE (namespace, agent_id)
) STRICT;
CREATE TABLE messages (
    agent INTEGER NOT NULL REFERENCES agents ON DELETE CASCADE,
    seq INTEGER NOT NULL,
    role TEXT NOT NULL,
    -- The message as JSON, sealed where the store is encrypted.
    message TEXT NOT NULL,
    PRIMARY KEY (agent, seq)
) STRICT, WITHOUT ROWID;
PRAGMA user_version = 1;
