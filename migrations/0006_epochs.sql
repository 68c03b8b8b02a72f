-- Up to where recovery brought a partition's journal back when it began an epoch.

CREATE TABLE epochs (
    partition    smallint NOT NULL CHECK (partition >= 0),
    epoch        integer NOT NULL CHECK (epoch >= 1),
    recovered_to bigint NOT NULL CHECK (recovered_to >= 0),
    began_at     timestamptz(3) NOT NULL DEFAULT now(),
    PRIMARY KEY (partition, epoch)
);

COMMENT ON TABLE epochs IS 'The timelines of each partition. An acceptance of an earlier epoch with a higher pseq than recovered_to was lost when this one began; its receipt may be redeemed.';
COMMENT ON COLUMN epochs.recovered_to IS 'The last journal entry of all earlier epochs that this one has.';
