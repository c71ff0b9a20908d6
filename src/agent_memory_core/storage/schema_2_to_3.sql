-- What the catalog of version 3 has and that of version 2 has not. `database.py` runs this file in a store of version 2.
CREATE TABLE writing (reservation INTEGER NOT NULL, key BLOB NOT NULL, root BLOB NOT NULL, kind TEXT NOT NULL);
CREATE TABLE doomed (
  key BLOB NOT NULL,
  root BLOB NOT NULL,
  kind TEXT NOT NULL,
  PRIMARY KEY (key, root, kind)) WITHOUT ROWID;
DROP TRIGGER record_removed;
CREATE TRIGGER record_removed AFTER DELETE ON records BEGIN
  UPDATE totals SET files = files - OLD.stored, bytes = bytes - OLD.nbytes;
  UPDATE records SET refs = refs - 1 WHERE key = OLD.parent;
  INSERT OR IGNORE INTO doomed SELECT OLD.key, OLD.root, OLD.kind WHERE OLD.stored;
END;
