//! Every key that configures Stockade, each declared once: its type, its names, its default, what it means
//! and what it can do to you. The struct, the table of `stockade check-config` and the list of known names
//! all come from this one declaration.

use std::net::SocketAddr;
use std::path::PathBuf;

use secrecy::SecretString;
use serde::Deserialize;

use crate::domain::allowance::Allowances;

use super::values::{AccessLog, LogFormat, Networks, Origins, RateLimit, RedisDurability, Switch};

/// One key, as `stockade check-config` shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// Its name in the TOML file, and the name of its field in [`Config`].
    pub name: &'static str,
    /// Its name in the environment.
    pub env: &'static str,
    /// What it is when nobody sets it, as it would be written; `None` leaves it unset.
    pub default: Option<&'static str>,
    /// What it means: lines of prose.
    pub meaning: &'static [&'static str],
    /// What a bad value costs; empty if nothing worth a warning.
    pub danger: &'static str,
    /// Never shown. Such a key may also be given as a file: `<env>_FILE` names it.
    pub secret: bool,
}

macro_rules! keys {
    (@default $default:literal) => { Some($default) };
    (@default unset) => { None };
    (@secret secret) => { true };
    (@secret shown) => { false };
    ($(
        $(#[doc = $meaning:literal])+
        $name:ident: $kind:ty = $default:tt, $shown:ident, $env:literal, danger: $danger:literal;
    )+) => {
        /// The configuration, as loaded and checked by [`Config::load`](super::Config::load).
        #[derive(Clone, Debug, Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct Config {
            $( $(#[doc = $meaning])+ pub $name: $kind, )+
        }

        /// Every key, in the order in which `stockade check-config` shows them.
        pub const KEYS: &[Key] = &[$(
            Key {
                name: stringify!($name),
                env: $env,
                default: keys!(@default $default),
                meaning: &[$($meaning),+],
                danger: $danger,
                secret: keys!(@secret $shown),
            },
        )+];
    };
}

keys! {
    /// Address that serves everything, or everything but the operators' part if `STOCKADE_ADMIN_ADDR` is set.
    http_addr: SocketAddr = "127.0.0.1:8080", shown, "STOCKADE_HTTP_ADDR",
        danger: "0.0.0.0 serves every network; put TLS in front of it";
    /// Address that takes the operators' routes and the metrics away from the public one.
    admin_addr: Option<SocketAddr> = unset, shown, "STOCKADE_ADMIN_ADDR",
        danger: "unset, operators' routes are guarded by their tokens alone";
    /// Directory of the embedded services' data, of generated secrets and of `endpoints.json`.
    data_dir: PathBuf = ".stockade", shown, "STOCKADE_DATA_DIR",
        danger: "it holds every accepted order; a disk that fills up stops the sale";
    /// Redis that decides (`redis://[user:password@]host:port`). Set together with `DATABASE_URL`, or not at all.
    redis_url: Option<SecretString> = unset, secret, "REDIS_URL",
        danger: "needs appendonly yes, appendfsync always, maxmemory-policy noeviction";
    /// What `appendfsync` of `REDIS_URL` is worth, `fsync` (always) or `fast` (everysec), for a server that does not
    /// show its settings (`CONFIG GET`). What it shows counts more; without either, nothing is sold.
    redis_durability: Option<RedisDurability> = unset, shown, "STOCKADE_REDIS_DURABILITY",
        danger: "believed and not verified: if it is wrong, orders say that they survive what they do not";
    /// Replicas that must have an order before its 201, in sales with the durability `replicated`, 0 to 5. With 0
    /// such sales do not sell. Redis needs `min-replicas-to-write` of at least as many and `min-replicas-max-lag` 1 to 5.
    replicas: u32 = "0", shown, "STOCKADE_REPLICAS",
        danger: "with min-replicas-to-write, Redis takes nothing of any sale while too few replicas follow";
    /// Redis for what may be lost: counters, caches, tickets.
    cache_redis_url: Option<SecretString> = unset, secret, "CACHE_REDIS_URL",
        danger: "the same server as REDIS_URL lets a cache fill the memory that sales need";
    /// PostgreSQL that remembers (`postgres://user:password@host:port/database`).
    /// Unset together with `REDIS_URL`, `serve` runs its own PostgreSQL and Redis.
    database_url: Option<SecretString> = unset, secret, "DATABASE_URL",
        danger: "synchronous_commit must stay on";
    /// Connections that this process opens to PostgreSQL at most, 2 to 500. The writer has one of its own besides.
    database_pool: u32 = "10", shown, "STOCKADE_DATABASE_POOL",
        danger: "all nodes together must stay below PostgreSQL's max_connections";
    /// Partitions that new sales are spread over, 1 to 1024. One Redis core serves one partition.
    partitions: u16 = "1", shown, "STOCKADE_PARTITIONS",
        danger: "";
    /// Key of the access tokens (HMAC-SHA256, its UTF-8 bytes) unless `STOCKADE_JWT_KEYS` is set, and what other
    /// keys are derived from: at least 32 bytes.
    /// Embedded: generated once and kept as `jwt_secret` in the data directory.
    jwt_secret: Option<SecretString> = unset, secret, "STOCKADE_JWT_SECRET",
        danger: "who knows it can sign a token for anyone, operators too";
    /// Keys of the access tokens, as `2:<secret>,1`: numbers 1 to 255, secrets of at least 32 bytes without
    /// commas; a bare `1` is `STOCKADE_JWT_SECRET`. The first signs, all verify, and no other does.
    jwt_keys: Option<SecretString> = unset, secret, "STOCKADE_JWT_KEYS",
        danger: "give every node a new key before it is the first, or the others refuse its tokens";
    /// Where the keys of another identity provider are (a JWKS, `https://…`). With its issuer and our audience its
    /// access tokens (RS256, ES256) are taken besides our own.
    jwks_url: Option<String> = unset, shown, "STOCKADE_JWKS_URL",
        danger: "whoever answers there can sign a token for anyone, operators too";
    /// `iss` of that provider's tokens, to the letter.
    jwt_issuer: Option<String> = unset, shown, "STOCKADE_JWT_ISSUER",
        danger: "";
    /// What `aud` of that provider's tokens must have: the name that it has for this API.
    jwt_audience: Option<String> = unset, shown, "STOCKADE_JWT_AUDIENCE",
        danger: "the name of a client instead of an API lets its ID tokens in";
    /// The claim of that provider's tokens with one role or several: a name, or a JSON pointer
    /// (`/realm_access/roles`).
    jwt_role_claim: String = "role", shown, "STOCKADE_JWT_ROLE_CLAIM",
        danger: "";
    /// Values of that claim that mean operator, separated by commas. Whoever has none is a buyer.
    jwt_operator_roles: String = "", shown, "STOCKADE_JWT_OPERATOR_ROLES",
        danger: "whoever gives these roles decides who runs sales";
    /// Values of that claim that mean admin, separated by commas.
    jwt_admin_roles: String = "", shown, "STOCKADE_JWT_ADMIN_ROLES",
        danger: "admins manage users";
    /// The claim of that provider's tokens with the instant at which the account was made, in seconds since the Unix
    /// epoch or as RFC 3339: a name, or a JSON pointer. Sales that ask for an account of some age need it.
    jwt_registered_claim: String = "registered_at", shown, "STOCKADE_JWT_REGISTERED_CLAIM",
        danger: "a claim that users can change themselves makes accounts as old as they like";
    /// Keys of receipts (HMAC-SHA256), as `2:<secret>,1:<secret>`: numbers 1 to 255, secrets of at least 32
    /// bytes without commas. The first signs, all verify. A number stands for one secret for ever, and a key
    /// stays until the last retry of its orders. Key 1 is derived from `STOCKADE_JWT_SECRET` unless it is here.
    receipt_keys: Option<SecretString> = unset, secret, "STOCKADE_RECEIPT_KEYS",
        danger: "orders of a key that is missing are not replayed; give every node a new key before it is the first";
    /// Keys that users' e-mail addresses and names are encrypted with, as `2:<secret>,1:<secret>`: numbers 1 to
    /// 255, secrets of at least 32 bytes without commas. The first encrypts, all decrypt. `plain,2:<secret>`
    /// encrypts nothing new. Unset, both are stored as they are. `stockade data-keys rotate` does the rest.
    data_keys: Option<SecretString> = unset, secret, "STOCKADE_DATA_KEYS",
        danger: "users of a key that is lost have no address any more and cannot log in";
    /// E-mail address of the operator that is created at start if absent.
    operator_email: Option<String> = unset, shown, "STOCKADE_OPERATOR_EMAIL",
        danger: "";
    /// Password of that operator, 8 to 72 bytes; an operator that exists keeps the old one.
    /// Embedded: generated and printed once.
    operator_password: Option<SecretString> = unset, secret, "STOCKADE_OPERATOR_PASSWORD",
        danger: "operators create, pause and restock sales";
    /// Cost of a password hash (bcrypt), 10 to 16; each step doubles it: 10 costs about 50 ms of a core.
    bcrypt_cost: u32 = "10", shown, "STOCKADE_BCRYPT_COST",
        danger: "at 12 ten logins a second fill two cores";
    /// Logins and registrations that may wait for the hashing pool, 1 to 1024; further ones are refused.
    password_hash_queue: usize = "32", shown, "STOCKADE_PASSWORD_HASH_QUEUE",
        danger: "a long queue answers long after its clients have gone";
    /// Origins that browsers may call from, separated by commas (`https://shop.example`). None by default.
    cors_origins: Origins = "", shown, "STOCKADE_CORS_ORIGINS",
        danger: "";
    /// PEM file with the certificate and its chain: with its key, the listeners speak TLS, HTTP/2 and HTTP/1.1. It is
    /// read again upon SIGHUP.
    tls_cert: Option<PathBuf> = unset, shown, "STOCKADE_TLS_CERT",
        danger: "browsers that have come over TLS refuse to come without it for a year";
    /// PEM file with the private key of that certificate.
    tls_key: Option<PathBuf> = unset, shown, "STOCKADE_TLS_KEY",
        danger: "who has it can be this server";
    /// Proxies that are believed when they say whom they speak for (`X-Forwarded-For`, or `Forwarded` without it):
    /// networks or addresses, separated by commas (`10.0.0.0/8`). None by default.
    trusted_proxies: Networks = "", shown, "STOCKADE_TRUSTED_PROXIES",
        danger: "a network with strangers in it lets them be anybody; without your proxy in it everybody is one address";
    /// Limits that differ from the usual ones, separated by commas: `user.purchase=20+2/s` is 20 at once, then 2 a
    /// second (`s`, `m` or `h`); `=off` is none. Their names and usual values are in docs/DEPLOYMENT.md.
    limits: Allowances = "", shown, "STOCKADE_LIMITS",
        danger: "below what people do, those of one user or one office are refused in the middle of a drop";
    /// Networks and addresses whose requests and connections are not counted per address, separated by commas: of
    /// load generators, of your own machines. Users and accounts are counted there, too.
    unlimited_addresses: Networks = "", shown, "STOCKADE_UNLIMITED_ADDRESSES",
        danger: "behind a proxy that is not in STOCKADE_TRUSTED_PROXIES everybody comes from its address";
    /// Connections from one address at once, 1 to 1048576; one more is closed. A quarter of all that the open files
    /// allow if unset. Those of trusted proxies and unlimited addresses are not counted.
    connections_per_address: Option<usize> = unset, shown, "STOCKADE_CONNECTIONS_PER_ADDRESS",
        danger: "an office behind one address has one for each of its people who watches, and more for browsers";
    /// `on` or `off`: every limit per user, address and account, and on connections. `off` is for benchmarks only and
    /// is logged loudly.
    rate_limit: RateLimit = "on", shown, "STOCKADE_RATE_LIMIT",
        danger: "off lets one client take the whole machine";
    /// Milliseconds after which a request is answered 503, 3000 to 60000. It must outlive a script's
    /// deadline of 2 seconds, or a purchase is given up while Redis may still accept it.
    request_timeout_ms: u64 = "10000", shown, "STOCKADE_REQUEST_TIMEOUT_MS",
        danger: "";
    /// Purchases of one partition that may wait for Redis on this node, 1 to 1048576; one more is answered 503.
    queue_capacity: usize = "16384", shown, "STOCKADE_QUEUE_CAPACITY",
        danger: "below the size of a crowd's first wave it refuses buyers whom Redis could have served";
    /// Seconds in which a round only redeems receipts after `stockade rebuild` went on without some of its
    /// acceptances, 0 to 86400. Then it sells again by itself.
    grace_seconds: u32 = "60", shown, "STOCKADE_GRACE_SECONDS",
        danger: "at 0 the public may buy what the receipts of lost orders were for";
    /// `off`, `combined` (as web servers write it) or `json`: one line per request.
    access_log: AccessLog = "off", shown, "STOCKADE_ACCESS_LOG",
        danger: "costs time on every purchase";
    /// File that the access log is appended to; standard output if unset.
    access_log_file: Option<PathBuf> = unset, shown, "STOCKADE_ACCESS_LOG_FILE",
        danger: "";
    /// Seconds after the close of a round until it settles, 0 to 31536000: no order of it can be given
    /// back any more, and its certificate is made.
    settle_after: u32 = "60", shown, "STOCKADE_SETTLE_AFTER",
        danger: "0 leaves nobody time to cancel after the close";
    /// Seconds after the close of a round until it leaves Redis, 0 to 31536000. PostgreSQL answers for
    /// it then, retries too.
    archive_after: u32 = "86400", shown, "STOCKADE_ARCHIVE_AFTER",
        danger: "retries of an archived round cost PostgreSQL a query each";
    /// `on` or `off`: the sandbox, a gateway with toy money. Unset, it is on with embedded stores, off with others.
    sandbox: Option<Switch> = unset, shown, "STOCKADE_SANDBOX",
        danger: "orders of sales with the payment `sandbox` are paid with nothing";
    /// Stripe's secret key (`sk_…` or a restricted `rk_…`). With the webhook's secret, sales may have the payment `stripe`.
    stripe_secret_key: Option<SecretString> = unset, secret, "STOCKADE_STRIPE_SECRET_KEY",
        danger: "who knows it can move the account's money";
    /// Secret of Stripe's webhook to `/v1/webhooks/stripe` (`whsec_…`); two, separated by a comma, while it is changed.
    stripe_webhook_secret: Option<SecretString> = unset, secret, "STOCKADE_STRIPE_WEBHOOK_SECRET",
        danger: "";
    /// Where Stripe's API is.
    stripe_url: String = "https://api.stripe.com", shown, "STOCKADE_STRIPE_URL",
        danger: "whoever answers there decides what is paid";
    /// PayPal's client id of a REST application. With its secret and a webhook, sales may have the payment `paypal`.
    paypal_client_id: Option<String> = unset, shown, "STOCKADE_PAYPAL_CLIENT_ID",
        danger: "";
    /// The secret of that application.
    paypal_client_secret: Option<SecretString> = unset, secret, "STOCKADE_PAYPAL_CLIENT_SECRET",
        danger: "who knows it can move the account's money";
    /// PayPal's id of the webhook to `/v1/webhooks/paypal`.
    paypal_webhook_id: Option<String> = unset, shown, "STOCKADE_PAYPAL_WEBHOOK_ID",
        danger: "";
    /// Where PayPal's API is; `https://api-m.sandbox.paypal.com` is its own sandbox.
    paypal_url: String = "https://api-m.paypal.com", shown, "STOCKADE_PAYPAL_URL",
        danger: "whoever answers there decides what is paid";
    /// Where a gateway sends the buyer's browser back to (`https://shop.example/paid`). Without it, only
    /// methods that need no redirection work with Stripe.
    payment_return_url: Option<String> = unset, shown, "STOCKADE_PAYMENT_RETURN_URL",
        danger: "";
    /// Secret that the key of the certificates is derived from: at least 32 bytes.
    /// Unset, it is derived from `STOCKADE_JWT_SECRET`.
    certificate_key: Option<SecretString> = unset, secret, "STOCKADE_CERTIFICATE_KEY",
        danger: "who knows it can sign a certificate";
    /// Seconds that a stored journal entry stays in Redis, 0 to 31536000.
    journal_retention: u32 = "3600", shown, "STOCKADE_JOURNAL_RETENTION",
        danger: "shorter than a failover of PostgreSQL takes back, the journal cannot give it again";
    /// What is logged: a level, or directives such as `info,stockade::writer=debug`.
    log: String = "info,sqlx=warn", shown, "STOCKADE_LOG",
        danger: "debug logs every purchase";
    /// `text` or `json`, to standard error.
    log_format: LogFormat = "text", shown, "STOCKADE_LOG_FORMAT",
        danger: "";
}
