-- The tables of a store's catalog, and the triggers that count for it. A database whose layout is another, because it is
-- older or damaged, is brought to this one when it is opened (`layout.py`); what else a change of this file needs is a
-- new version. Times are seconds since the epoch; keys, parents and roots are sha256 digests of 32 bytes.

-- What the chains of records start from: one row for each model, codec, block size and namespace.
CREATE TABLE roots (
  root BLOB PRIMARY KEY NOT NULL CHECK (length(root) = 32),
  namespace TEXT NOT NULL,
  model TEXT NOT NULL,          -- a name to show to people
  identity TEXT NOT NULL) STRICT; -- JSON: everything that the root was hashed from

-- One row for each session and root. A session that used two models has two rows.
CREATE TABLE sessions (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  namespace TEXT NOT NULL,
  session_id TEXT NOT NULL,
  root BLOB NOT NULL,
  pinned INTEGER NOT NULL,      -- 1: never evicted
  is_thread INTEGER NOT NULL,   -- 1: the id is that of a framework's thread
  is_known INTEGER NOT NULL DEFAULT 1, -- 0: no turn of it has ended yet, so that it only owns a part of a prompt
  created REAL NOT NULL,
  last_use REAL NOT NULL,
  UNIQUE (namespace, session_id, root)) STRICT;

CREATE TABLE branches (
  branch_id INTEGER PRIMARY KEY AUTOINCREMENT,
  session INTEGER NOT NULL,
  generation INTEGER NOT NULL,  -- grows by one with every commit
  head BLOB NOT NULL,           -- the last full block, or the root
  tail BLOB,                    -- the unfinished last block, if there is one
  tokens INTEGER NOT NULL,      -- length of the branch
  prompt_tokens INTEGER NOT NULL,
  lane TEXT NOT NULL,
  created REAL NOT NULL,
  last_use REAL NOT NULL) STRICT;
CREATE INDEX branches_session ON branches (session);
CREATE INDEX branches_head ON branches (head);
CREATE INDEX branches_tail ON branches (tail);
CREATE INDEX branches_age ON branches (last_use);

-- Records that a branch needs besides its blocks and its tail.
CREATE TABLE dependencies (
  branch INTEGER NOT NULL,
  key BLOB NOT NULL,
  PRIMARY KEY (branch, key)) WITHOUT ROWID, STRICT;
CREATE INDEX dependencies_key ON dependencies (key);

-- One row for each file. A row with stored = 0 is a ghost: its file is lost, but something still follows it.
CREATE TABLE records (
  id INTEGER PRIMARY KEY,
  key BLOB NOT NULL UNIQUE CHECK (length(key) = 32),
  parent BLOB NOT NULL,
  root BLOB NOT NULL,
  tokens BLOB NOT NULL,         -- little-endian u32; empty where a rebuild could not know them
  ntok INTEGER NOT NULL,
  start BLOB NOT NULL DEFAULT x'', -- a hash of the parent and the first tokens; empty where these are not known
  kind TEXT NOT NULL CHECK (kind IN ('block', 'tail', 'window', 'token_tail')),
  nbytes INTEGER NOT NULL CHECK (nbytes >= 0), -- size of the file
  checksum TEXT NOT NULL,       -- xxh3-128 of its payload, in hex
  stored INTEGER NOT NULL CHECK (stored IN (0, 1)),
  refs INTEGER NOT NULL,        -- how many rows need this one; kept by the triggers below
  owner INTEGER NOT NULL,       -- the session that stored it first, or 0
  last_use REAL NOT NULL) STRICT;
CREATE INDEX records_parent ON records (parent);
CREATE INDEX records_start ON records (start, stored);
CREATE INDEX records_owner ON records (owner);
CREATE INDEX records_free ON records (last_use) WHERE refs = 0;
CREATE INDEX records_without_start ON records (key) WHERE start = x'' AND (tokens <> x'' OR ntok = 0);
CREATE INDEX records_without_tokens ON records (root) WHERE tokens = x'' AND ntok > 0;

-- How many files and bytes `records` names under each root, kept by the triggers below.
CREATE TABLE totals (
  root BLOB PRIMARY KEY NOT NULL,
  files INTEGER NOT NULL,
  bytes INTEGER NOT NULL) WITHOUT ROWID, STRICT;

-- Bytes of the quota that an opening of the store set aside for a turn that it is writing under that root.
CREATE TABLE reservations (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  process TEXT NOT NULL,
  root BLOB NOT NULL,
  bytes INTEGER NOT NULL) STRICT;

-- Records that must stay until such a turn is committed.
CREATE TABLE holds (reservation INTEGER NOT NULL, key BLOB NOT NULL) STRICT;
CREATE INDEX holds_reservation ON holds (reservation);
CREATE INDEX holds_key ON holds (key);

-- Files that such a turn is about to write, under their own names: those of a process that died have no row.
CREATE TABLE writing (
  reservation INTEGER NOT NULL,
  key BLOB NOT NULL,
  root BLOB NOT NULL,
  kind TEXT NOT NULL) STRICT;

-- Files whose rows are gone, until they are deleted too. A process that is killed between the two leaves them here.
CREATE TABLE doomed (
  key BLOB NOT NULL,
  root BLOB NOT NULL,
  kind TEXT NOT NULL,
  PRIMARY KEY (key, root, kind)) WITHOUT ROWID, STRICT;

-- Texts that other parts of the program keep here, each under a key of its own.
CREATE TABLE notes (key TEXT PRIMARY KEY NOT NULL, text TEXT NOT NULL) STRICT;

CREATE TRIGGER record_added AFTER INSERT ON records BEGIN
  INSERT OR IGNORE INTO totals VALUES (NEW.root, 0, 0);
  UPDATE totals SET files = files + NEW.stored, bytes = bytes + NEW.nbytes WHERE root = NEW.root;
  UPDATE records SET refs = refs + 1 WHERE key = NEW.parent;
  UPDATE records SET refs = (SELECT count(*) FROM records WHERE parent = NEW.key)
    + (SELECT count(*) FROM branches WHERE head = NEW.key) + (SELECT count(*) FROM branches WHERE tail = NEW.key)
    + (SELECT count(*) FROM holds WHERE key = NEW.key) + (SELECT count(*) FROM dependencies WHERE key = NEW.key)
    WHERE id = NEW.id;
END;
CREATE TRIGGER record_changed AFTER UPDATE OF stored, nbytes ON records BEGIN
  UPDATE totals SET files = files + NEW.stored - OLD.stored, bytes = bytes + NEW.nbytes - OLD.nbytes
    WHERE root = OLD.root;
END;
CREATE TRIGGER record_removed AFTER DELETE ON records BEGIN
  UPDATE totals SET files = files - OLD.stored, bytes = bytes - OLD.nbytes WHERE root = OLD.root;
  UPDATE records SET refs = refs - 1 WHERE key = OLD.parent;
  INSERT OR IGNORE INTO doomed SELECT OLD.key, OLD.root, OLD.kind WHERE OLD.stored;
END;
CREATE TRIGGER hold_added AFTER INSERT ON holds BEGIN
  UPDATE records SET refs = refs + 1 WHERE key = NEW.key;
END;
CREATE TRIGGER hold_removed AFTER DELETE ON holds BEGIN
  UPDATE records SET refs = refs - 1 WHERE key = OLD.key;
END;
CREATE TRIGGER dependency_added AFTER INSERT ON dependencies BEGIN
  UPDATE records SET refs = refs + 1 WHERE key = NEW.key;
END;
CREATE TRIGGER dependency_removed AFTER DELETE ON dependencies BEGIN
  UPDATE records SET refs = refs - 1 WHERE key = OLD.key;
END;
CREATE TRIGGER branch_added AFTER INSERT ON branches BEGIN
  UPDATE records SET refs = refs + 1 WHERE key = NEW.head;
  UPDATE records SET refs = refs + 1 WHERE key = NEW.tail;
END;
CREATE TRIGGER branch_moved AFTER UPDATE OF head, tail ON branches BEGIN
  UPDATE records SET refs = refs - 1 WHERE key = OLD.head;
  UPDATE records SET refs = refs - 1 WHERE key = OLD.tail;
  UPDATE records SET refs = refs + 1 WHERE key = NEW.head;
  UPDATE records SET refs = refs + 1 WHERE key = NEW.tail;
END;
CREATE TRIGGER branch_removed AFTER DELETE ON branches BEGIN
  UPDATE records SET refs = refs - 1 WHERE key = OLD.head;
  UPDATE records SET refs = refs - 1 WHERE key = OLD.tail;
  DELETE FROM dependencies WHERE branch = OLD.branch_id;
END;
