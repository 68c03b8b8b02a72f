-- What a sale's report needs and no journal has: who was refused, and what buyers want to be called.
CREATE TABLE refusals (
    sale     integer        NOT NULL,
    round    integer        NOT NULL CHECK (round >= 1),
    minute   timestamptz(3) NOT NULL,
    reason   text           NOT NULL,
    node     uuid           NOT NULL,
    requests bigint         NOT NULL CHECK (requests > 0),
    units    bigint         NOT NULL CHECK (units >= requests),
    PRIMARY KEY (sale, round, minute, reason, node)
);
COMMENT ON TABLE refusals IS 'Purchases that were refused, counted by each process in memory and put here every few seconds: what a process that is killed had not put here yet is missing.';
COMMENT ON COLUMN refusals.minute IS 'The minute of the decision, by Redis'' clock as far as it is known.';
COMMENT ON COLUMN refusals.reason IS 'The code of the problem that was answered.';
COMMENT ON COLUMN refusals.node IS 'The process that counted; another one after each start.';
COMMENT ON COLUMN refusals.requests IS 'How many in all, not since the last time: putting it here twice is putting it here once.';
COMMENT ON COLUMN refusals.units IS 'Units that they asked for, retries included.';

CREATE TABLE buyer_profiles (
    buyer                uuid    PRIMARY KEY,
    display_name         text    CHECK (char_length(display_name) BETWEEN 1 AND 40),
    show_on_leaderboards boolean NOT NULL DEFAULT false,
    CONSTRAINT buyer_profiles_show_a_name CHECK (NOT show_on_leaderboards OR display_name IS NOT NULL)
);
COMMENT ON TABLE buyer_profiles IS 'What buyers want to be called in public; most have no row. No foreign key to users: buyers may come from another identity provider.';
COMMENT ON COLUMN buyer_profiles.show_on_leaderboards IS 'Whether leaderboards show the name; otherwise only the pseudonym.';
