//! The composition root: makes the parts, wires them, and starts their tasks.
//!
//! The same builder makes the application for production and for tests.

use std::{
    collections::{BTreeSet, HashMap},
    io,
    net::SocketAddr,
    num::NonZeroUsize,
    sync::Arc,
    thread::available_parallelism,
    time::Duration,
};

use anyhow::Context;
use axum::{Router, http::HeaderValue};
use rustix::process::{Resource, getrlimit};
use secrecy::{ExposeSecret, SecretString};
use tokio::{
    net::{TcpListener, TcpSocket},
    signal::unix::{SignalKind, signal},
    sync::{Notify, watch},
};
use tokio_util::sync::CancellationToken;

use crate::{
    auth::{
        self,
        accounts::{AccountError, Accounts},
        api_key::ApiKeys,
        barred::Barred,
        bearer::Bearers,
        email::Email,
        outside::{Outside, Provider},
        password::PasswordHasher,
        session::Successors,
        ticket::Tickets,
        token::{Identity, LIFETIME_MAX_SECONDS, Secret, TokenKeys},
    },
    catalogue::{Catalogue, Painter},
    clock,
    config::{self, Config, Endpoints, RateLimit, Stores as Source, Switch},
    domain::{
        durability::Lack, id::Partition, order::Mode, payment::Gateway as GatewayName,
        proof::ProofKey, receipt::ReceiptKeys,
    },
    engine::{Cache, Engine, EngineError, EngineOptions, Engines, Fence, RedisUrl},
    faults,
    http::{self, AccessLog, Door, HttpSettings, HttpState, Listener, Tls},
    lifecycle::{Lifecycle, Stage},
    metrics::{DurabilityLabels, Metrics, PartitionLabels},
    ops::{
        audit_log::{self, AuditTrail},
        auditor::{Auditor, Patrol},
        certificate::CertificateKey,
        ending::RoundEnds,
        holds::Sweeper,
        recovery::Recovery,
        trimming::Trimmer,
    },
    payments::{Gateway, Gateways, Paypal, PaypalSettings, Sandbox, Stripe, StripeSettings},
    readiness::Readiness,
    realtime::{Desks, Holder, Hub, OwnLimits},
    sales::{
        Archive, BuyerNames, Checkouts, Commits, Demand, Gate, OpenSales, Pseudonyms, RoundKeeper,
        Shop, Till,
    },
    store::{
        Database, DatabaseSettings,
        api_keys::ApiKeyTable,
        audit_log::AuditLog,
        carts::Carts,
        directory::Directory,
        endings::Endings,
        epochs::Epochs,
        floors::Floors,
        images::Images,
        incidents::Incidents,
        journal::{Ledger, Positions},
        orders::Orders,
        payments::Payments,
        personal::Personal,
        products::Products,
        profiles::Profiles,
        receipt_keys,
        refusals::Refusals,
        reports::Reports,
        rounds::Rounds,
        sales::Sales,
        sandbox::ToyBank,
        schedules::Schedules,
        sessions::Sessions,
        users::Users,
    },
    throttle::{Throttle, ThrottleSettings},
    writer::{State, Writer},
};

/// How much sooner than its request a payment is answered, in milliseconds.
const REQUEST_MARGIN_MS: u64 = 1_000;

/// The time between two looks at what the metrics and `/readyz` show.
const LOOK: Duration = Duration::from_millis(200);

/// How long the last answers may take once the process stops: the later stages need the rest.
const LAST_ANSWERS: Duration = Duration::from_secs(4);

/// Connections that may wait to be accepted, as far as `net.core.somaxconn` allows. A crowd comes
/// at one instant.
const ACCEPT_QUEUE: u32 = 4_096;

/// Files that the node itself needs besides PostgreSQL's connections: Redis', logs, the listeners.
const OWN_FILES: u64 = 128;

/// One connection in so many is kept for those who buy, however many watch.
const BUYERS_SHARE: u64 = 32;

/// One address may have one connection in so many.
const ADDRESS_SHARE: usize = 4;

/// Streams of their own events that one user may have open on a node.
const OWN_STREAMS: usize = 10;

/// How long PostgreSQL may take to be there at start.
const PATIENCE: Duration = Duration::from_secs(30);

/// Something that a process can do. Several processes share the work of a sale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Role {
    /// Answer requests.
    Http,
    /// Drain the journal into PostgreSQL.
    Writer,
}

impl Role {
    /// Everything.
    pub const ALL: &[Self] = &[Self::Http, Self::Writer];
}

/// An application that has started. Its tasks live as long as its [`Lifecycle`].
#[derive(Clone)]
pub struct App {
    /// Where it answers; `None` without [`Role::Http`].
    pub http_addr: Option<SocketAddr>,
    /// Where operators are answered, if not there.
    pub admin_addr: Option<SocketAddr>,
    /// Whether it wants traffic.
    pub readiness: Readiness,
    /// Everything that sells; `None` without [`Role::Http`].
    pub shop: Option<Arc<Shop>>,
    /// The catalogue.
    pub products: Products,
    /// A password that was generated for the configured operator: shown once, kept nowhere.
    pub generated_password: Option<SecretString>,
}

/// The stores and what is made of them alone.
struct Stores {
    database: Database,
    engines: Engines,
    positions: Positions,
    rounds: Rounds,
    receipts: Option<ReceiptKeys>,
    /// Holds what may be lost.
    cache: Cache,
}

/// Starts everything that `roles` names.
///
/// # Errors
/// What cannot be mended by waiting: a store that is not there, a secret that is missing, an
/// address that is taken.
pub async fn start(
    config: &Config,
    endpoints: &Endpoints,
    roles: &[Role],
    life: &Lifecycle,
) -> anyhow::Result<App> {
    let metrics = Arc::new(Metrics::new());
    let readiness = Readiness::new(&["operator", "partitions", "postgresql", "redis"]);
    let stores = connect(config, endpoints, &metrics).await?;
    for engine in stores.engines.all() {
        let settings = engine.settings();
        let partition = engine.partition();
        match engine.gives(Mode::Default) {
            Ok(durability) if settings.unverified() => tracing::warn!(
                %partition,
                durability = durability.as_str(),
                %settings,
                "Redis, by what STOCKADE_REDIS_DURABILITY says and nobody has verified"
            ),
            Ok(durability) => {
                tracing::info!(%partition, durability = durability.as_str(), %settings, "Redis");
            }
            Err(lack) => tracing::error!(%partition, %lack, %settings, "Redis: nothing is sold"),
        }
    }

    let recovery = Recovery {
        engines: stores.engines.clone(),
        positions: stores.positions.clone(),
        rounds: stores.rounds.clone(),
        floors: Floors::new(stores.database.clone()),
        epochs: Epochs::new(stores.database.clone()),
        incidents: Incidents::new(stores.database.clone()),
        metrics: metrics.recovery.clone(),
        database: stores.database.clone(),
        node: clock::new_id(),
        sells: true,
    };
    let stop = life.token(Stage::Background);
    life.spawn(Stage::Background, "recovery", async move {
        recovery.run(stop).await;
        Ok(())
    });

    let writers = if roles.contains(&Role::Writer) {
        writers(&stores).await?
    } else {
        Vec::new()
    };
    let stored = writers
        .iter()
        .map(|writer| (writer.partition(), writer.stored()))
        .collect();
    let statuses: Vec<_> = writers
        .iter()
        .map(|writer| (writer.partition(), writer.status()))
        .collect();
    for writer in writers {
        let (stop, hard) = (life.token(Stage::Writer), life.hard());
        let engines = stores.engines.clone();
        life.spawn(Stage::Writer, "writer", async move {
            // Before the first epoch there is no journal to read.
            if let Some(engine) = engines.of(writer.partition()) {
                let _ = stop.run_until_cancelled(engine.verified()).await;
            }
            writer.run(stop, hard).await;
            Ok(())
        });
    }

    let auditor = Auditor::new(stores.database.clone(), stores.engines.clone());
    if roles.contains(&Role::Writer) {
        let patrol = Patrol::new(auditor.clone(), metrics.audit.clone());
        let stop = life.token(Stage::Background);
        let engines = stores.engines.clone();
        life.spawn(Stage::Background, "auditor", async move {
            // Before the first epoch there is nothing to look at.
            let _ = stop.run_until_cancelled(engines.verified()).await;
            patrol.run(stop).await;
            Ok(())
        });
        housekeeping(config, &stores, auditor.clone(), life)?;
    }

    // In every process: a hold must end in time also when the others are gone.
    let sweeper = Sweeper {
        engines: stores.engines.clone(),
        rounds: stores.rounds.clone(),
        metrics: metrics.holds.clone(),
    };
    let stop = life.token(Stage::Background);
    life.spawn(Stage::Background, "holds", async move {
        sweeper.run(stop).await;
        Ok(())
    });

    // Unknown is not kept.
    let (keeps, kept) = watch::channel(Err(Lack::new("PostgreSQL has not been asked yet")));
    let look = Look {
        keeps,
        replicated: config.replicas > 0,
        engines: stores.engines.clone(),
        database: stores.database.clone(),
        metrics: Arc::clone(&metrics),
        readiness: readiness.clone(),
        statuses,
    };
    let stop = life.token(Stage::Background);
    life.spawn(Stage::Background, "look", async move {
        stop.run_until_cancelled(look.again_and_again()).await;
        Ok(())
    });

    let mut app = App {
        http_addr: None,
        admin_addr: None,
        readiness,
        shop: None,
        products: Products::new(stores.database.clone()),
        generated_password: None,
    };
    if roles.contains(&Role::Http) {
        let wired = Wired {
            stored,
            auditor,
            kept,
        };
        serve(config, &stores, wired, &metrics, life, &mut app).await?;
    } else {
        app.readiness.pass("operator");
    }
    Ok(app)
}

/// Starts what needs the writer beside it: the end of rounds, and short journals.
fn housekeeping(
    config: &Config,
    stores: &Stores,
    auditor: Auditor,
    life: &Lifecycle,
) -> anyhow::Result<()> {
    let seconds = |seconds: u32| chrono::TimeDelta::seconds(seconds.into());
    let ends = RoundEnds {
        auditor,
        engines: stores.engines.clone(),
        endings: Endings::new(stores.database.clone()),
        orders: Orders::new(stores.database.clone()),
        payments: Payments::new(stores.database.clone()),
        key: certificate_key(config)?,
        settle_after: seconds(config.settle_after),
        archive_after: seconds(config.archive_after),
    };
    let (stop, engines) = (life.token(Stage::Background), stores.engines.clone());
    life.spawn(Stage::Background, "ends of rounds", async move {
        let _ = stop.run_until_cancelled(engines.verified()).await;
        ends.run(stop).await;
        Ok(())
    });
    let (log, stop) = (
        AuditLog::new(stores.database.clone()),
        life.token(Stage::Writer),
    );
    life.spawn(Stage::Writer, "audit log's chain", async move {
        audit_log::chain(log, stop).await;
        Ok(())
    });
    let trimmer = Trimmer {
        engines: stores.engines.clone(),
        positions: stores.positions.clone(),
        retention: seconds(config.journal_retention),
    };
    let stop = life.token(Stage::Background);
    life.spawn(Stage::Background, "trimming", async move {
        trimmer.run(stop).await;
        Ok(())
    });
    Ok(())
}

/// The key that signs certificates, if there is a secret to derive it from.
fn certificate_key(config: &Config) -> anyhow::Result<Option<CertificateKey>> {
    let secret = config
        .certificate_key
        .as_ref()
        .or(config.jwt_secret.as_ref());
    let key = secret.map(|secret| CertificateKey::derive(secret.expose_secret().as_bytes()));
    Ok(key.transpose()?)
}

async fn connect(
    config: &Config,
    endpoints: &Endpoints,
    metrics: &Metrics,
) -> anyhow::Result<Stores> {
    let settings = DatabaseSettings {
        connections_max: config.database_pool,
        ..DatabaseSettings::default()
    };
    let database = Database::new(endpoints.database_url.expose_secret(), settings)
        .context("DATABASE_URL cannot be read")?;
    migrate(&database).await?;
    let receipts = match config.receipt_keys()? {
        Some(keys) => Some(known_keys(&database, keys).await?),
        None => None,
    };
    let options = EngineOptions {
        url: RedisUrl(endpoints.redis_url.clone()),
        queue_capacity: config.queue_capacity,
        receipt_key: receipts.as_ref().map_or(0, ReceiptKeys::signing),
        said: config.said(),
    };
    let positions = Positions::new(database.clone());
    let rounds = Rounds::new(database.clone());
    let mut engines = Vec::new();
    for number in 0..config.partitions {
        let partition = Partition(number);
        let engine = Engine::connect(&options, partition, metrics.engine.clone())
            .await
            .map_err(|error| {
                let what = match error {
                    EngineError::Refused(_) => "Redis at REDIS_URL lets nobody sell",
                    _ => "Redis does not answer at REDIS_URL: start it",
                };
                anyhow::Error::new(error).context(what)
            })?;
        engines.push(engine);
    }
    let cache = endpoints.cache_redis_url.clone().map(RedisUrl);
    Ok(Stores {
        cache: Cache::connect(cache.as_ref()).context("CACHE_REDIS_URL")?,
        database,
        engines: Engines::new(engines),
        positions,
        rounds,
        receipts,
    })
}

/// The keys of receipts without those whose number stood for another secret before: what such a key
/// signed can be told neither in its old bytes nor in others.
///
/// # Errors
/// When the key that signs is such a one, or PostgreSQL does not answer.
async fn known_keys(database: &Database, mut keys: ReceiptKeys) -> anyhow::Result<ReceiptKeys> {
    let signing = keys.signing();
    for number in receipt_keys::claim(database, &keys.fingerprints()).await? {
        if faults::bug("other_secret_believed") {
            break;
        }
        anyhow::ensure!(
            number != signing,
            "receipt key {number} has another secret than before: put the old one back, or give the \
             new one a number of its own in STOCKADE_RECEIPT_KEYS (key 1 comes from \
             STOCKADE_JWT_SECRET if the list has none)"
        );
        tracing::warn!(
            key = number,
            "this receipt key has another secret than before and is left out: orders that it signed \
             are not replayed, and their receipts not redeemed, until the old one is back"
        );
        keys.forget(number);
    }
    Ok(keys)
}

/// Migrates, as soon as PostgreSQL is there.
///
/// # Errors
/// When it is not there in time, or has a schema that this version does not know.
pub async fn migrate(database: &Database) -> anyhow::Result<()> {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        match database.migrate().await {
            Ok(()) => return Ok(()),
            Err(error @ crate::store::StoreError::Unavailable(_))
                if tokio::time::Instant::now() < deadline =>
            {
                tracing::warn!(%error, "waiting for PostgreSQL");
                tokio::time::sleep(LOOK).await;
            }
            Err(error) => {
                return Err(error).context("PostgreSQL at DATABASE_URL could not be migrated");
            }
        }
    }
}

async fn writers(stores: &Stores) -> anyhow::Result<Vec<Writer>> {
    let mut writers = Vec::new();
    for engine in stores.engines.all() {
        let ledger = Ledger::new(&stores.database, engine.partition());
        writers.push(Writer::new(ledger, engine.journal_reader().await?));
    }
    Ok(writers)
}

/// What the parts that answer requests learn from those that do not.
struct Wired {
    stored: HashMap<Partition, crate::writer::StoredPosition>,
    auditor: Auditor,
    kept: watch::Receiver<Result<(), Lack>>,
}

/// Starts what answers requests.
async fn serve(
    config: &Config,
    stores: &Stores,
    wired: Wired,
    metrics: &Arc<Metrics>,
    life: &Lifecycle,
    app: &mut App,
) -> anyhow::Result<()> {
    let Wired {
        stored,
        auditor,
        kept,
    } = wired;
    let secret = config
        .jwt_secret
        .as_ref()
        .context("STOCKADE_JWT_SECRET is not set")?;
    let secret = secret.expose_secret().as_bytes();
    // Whatever else is derived from the secret stays as it is when these change.
    let keys: Vec<_> = config
        .token_keys()?
        .into_iter()
        .map(|(number, bytes)| (number.to_string(), bytes))
        .collect();
    let keys: Vec<_> = keys
        .iter()
        .map(|(id, bytes)| Secret { id, bytes })
        .collect();
    let tokens = Arc::new(TokenKeys::new(&keys, LIFETIME_MAX_SECONDS)?);
    // One core stays for everybody who is logged in already.
    let cores = available_parallelism().map_or(1, NonZeroUsize::get);
    let workers = NonZeroUsize::new(cores - 1).unwrap_or(NonZeroUsize::MIN);
    let passwords = PasswordHasher::new(
        config.bcrypt_cost,
        workers,
        config.password_hash_queue,
        metrics.passwords.clone(),
    )?;
    let database = &stores.database;
    let barred = Barred::new(Sessions::new(database.clone()), metrics.identity.clone());
    let barred = Arc::new(barred);
    let (news, stop) = (Arc::clone(&barred), life.token(Stage::Background));
    life.spawn(Stage::Background, "ended sessions", async move {
        news.run(stop).await;
        Ok(())
    });
    let api_keys = ApiKeys::new(ApiKeyTable::new(database.clone()), metrics.identity.clone());
    let api_keys = Arc::new(api_keys);
    let bearers = Bearers::new(
        Arc::clone(&tokens),
        Arc::clone(&api_keys),
        outside(config, life)?,
        Arc::clone(&barred),
    );
    let users = Users::new(database.clone(), Arc::new(config.data_keys()?));
    let missing = users.missing_keys().await?;
    anyhow::ensure!(
        missing.is_empty(),
        "users are encrypted with key {}, which STOCKADE_DATA_KEYS lacks or has with another secret: \
         put it back, or nobody of them can log in",
        missing
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(", ")
    );
    let tickets = Tickets::new(secret, stores.cache.clone(), Arc::clone(&barred))?;
    let accounts = Accounts {
        barred: Arc::clone(&barred),
        api_keys: Arc::clone(&api_keys),
        users,
        personal: Personal::new(database.clone()),
        sessions: Sessions::new(database.clone()),
        passwords,
        tokens,
        successors: Arc::new(Successors::new(secret)?),
    };
    app.generated_password = operator(config, &accounts).await?;
    app.readiness.pass("operator");

    let orders = Orders::new(database.clone());
    let commits = Commits::new(
        stores.positions.clone(),
        orders.clone(),
        kept,
        stores.engines.all().iter().map(|engine| {
            let partition = engine.partition();
            (partition, stored.get(&partition).cloned())
        }),
    );
    let shop = Arc::new(Shop {
        engines: stores.engines.clone(),
        directory: Directory::new(database.clone()),
        sales: Sales::new(database.clone()),
        rounds: stores.rounds.clone(),
        schedules: Schedules::new(database.clone()),
        orders,
        commits,
        positions: stores.positions.clone(),
        stored,
        pseudonyms: Pseudonyms::new(secret)?,
        gate: Gate::new(ProofKey::new(secret)?),
        epochs: Epochs::new(database.clone()),
        archive: Archive::new(Orders::new(database.clone())),
        names: BuyerNames::new(Profiles::new(database.clone())),
        demand: Demand::new(Refusals::new(database.clone())),
        open: OpenSales::new(Sales::new(database.clone()), metrics.catalogue.clone()),
        receipts: stores
            .receipts
            .clone()
            .context("there is no key of receipts")?,
    });
    let keeper = RoundKeeper {
        engines: stores.engines.clone(),
        rounds: stores.rounds.clone(),
        schedules: shop.schedules.clone(),
        directory: shop.directory.clone(),
    };
    let stop = life.token(Stage::Background);
    life.spawn(Stage::Background, "rounds", async move {
        keeper.run(stop).await;
        Ok(())
    });

    let (gateways, sandbox) = gateways(config, database)?;
    let till = Arc::new(Till {
        shop: Arc::clone(&shop),
        payments: Payments::new(database.clone()),
        gateways: gateways.clone(),
        sandbox: sandbox.clone(),
        // The answer has to be there before the request is given up.
        patience: Duration::from_millis(config.request_timeout_ms - REQUEST_MARGIN_MS),
        due: Notify::new(),
    });
    let (worker, stop) = (Arc::clone(&till), life.token(Stage::Background));
    let engines = stores.engines.clone();
    life.spawn(Stage::Background, "payments", async move {
        let _ = stop.run_until_cancelled(engines.verified()).await;
        worker.run(stop).await;
        Ok(())
    });

    let checkouts = Checkouts {
        shop: Arc::clone(&shop),
        carts: Carts::new(database.clone()),
    };
    let (worker, stop) = (checkouts.clone(), life.token(Stage::Background));
    let engines = stores.engines.clone();
    life.spawn(Stage::Background, "checkouts", async move {
        let _ = stop.run_until_cancelled(engines.verified()).await;
        worker.run(stop).await;
        Ok(())
    });

    let (demand, stop) = (shop.demand.clone(), life.token(Stage::Background));
    life.spawn(Stage::Background, "demand", async move {
        demand.run(stop).await;
        Ok(())
    });

    let files = Files::of_this_process(config.database_pool);
    let hub = Hub::new(
        stores.engines.clone(),
        shop.directory.clone(),
        shop.sales.clone(),
        files.streams,
        metrics.realtime.clone(),
    );
    // Ends all streams first: no listener stops before its last connection has.
    let (live, stop) = (hub.clone(), life.token(Stage::Requests));
    life.spawn(Stage::Requests, "live stock", async move {
        live.run(stop).await;
        Ok(())
    });

    let desks = desks(config, stores, &shop, &hub, &files, barred, life);

    let settings = HttpSettings {
        cors_origins: config
            .cors_origins
            .iter()
            .map(HeaderValue::from_str)
            .collect::<Result<_, _>>()
            .context("STOCKADE_CORS_ORIGINS")?,
        request_timeout: Duration::from_millis(config.request_timeout_ms),
        access_log: access_log(config, metrics).await?,
        trusted_proxies: config.trusted_proxies.clone(),
        throttle: throttle(config, secret, stores, metrics, life)?,
        tls: config.tls_cert.is_some(),
    };
    let audit_log = AuditLog::new(database.clone());
    let (audit_trail, notes) =
        AuditTrail::new(audit_log.clone(), secret, metrics.audit_log.clone())?;
    let stop = life.token(Stage::Background);
    life.spawn(Stage::Background, "audit log", async move {
        notes.run(stop).await;
        Ok(())
    });
    let state = HttpState::new(http::Parts {
        bearers: Arc::new(bearers),
        api_keys,
        accounts,
        products: app.products.clone(),
        catalogue: Catalogue::new(
            app.products.clone(),
            Images::new(database.clone()),
            stores.cache.clone(),
            metrics.catalogue.clone(),
        ),
        painter: Painter::default(),
        shop: Arc::clone(&shop),
        checkouts,
        till,
        gateways,
        sandbox,
        auditor,
        audit_log,
        audit_trail,
        incidents: Incidents::new(database.clone()),
        reports: Reports::new(database.clone()),
        endings: Endings::new(database.clone()),
        certificate_key: certificate_key(config)?,
        hub,
        desks,
        tickets,
        metrics: Arc::clone(metrics),
        readiness: app.readiness.clone(),
    });
    app.shop = Some(shop);
    let public = match config.admin_addr {
        Some(_) => Listener::Public,
        None => Listener::All,
    };
    let router = http::router(state.clone(), &settings, public);
    let door = door(config, &files, metrics, life)?;
    app.http_addr = Some(listen(
        config.http_addr,
        router,
        door.clone(),
        "http",
        life,
    )?);
    if let Some(addr) = config.admin_addr {
        let router = http::router(state, &settings, Listener::All);
        // Operators get in when the crowd has taken all the rest.
        let door = Door {
            connections: usize::MAX,
            per_address: usize::MAX,
            ..door
        };
        app.admin_addr = Some(listen(addr, router, door, "admin", life)?);
    }
    Ok(())
}

/// Buyers' own events, which end with their sessions.
fn desks(
    config: &Config,
    stores: &Stores,
    shop: &Shop,
    hub: &Hub,
    files: &Files,
    barred: Arc<Barred>,
    life: &Lifecycle,
) -> Desks {
    let desks = Desks::new(
        stores.engines.clone(),
        shop.directory.clone(),
        shop.orders.clone(),
        hub.clone(),
        OwnLimits {
            // The rest is for those who only watch.
            streams: files.streams / 2,
            per_user: match config.rate_limit {
                RateLimit::On => OWN_STREAMS,
                RateLimit::Off => usize::MAX,
            },
        },
    );
    let (own, stop) = (desks.clone(), life.token(Stage::Requests));
    life.spawn(Stage::Requests, "own events", async move {
        own.run(stop).await;
        Ok(())
    });
    let (own, stop) = (desks.clone(), life.token(Stage::Background));
    life.spawn(Stage::Background, "ends of streams", async move {
        let mut learnt = barred.learnt();
        while let Some(Ok(())) = stop.run_until_cancelled(learnt.changed()).await {
            own.log_out(|holder: &Holder| {
                barred.bars(&Identity {
                    user: holder.user,
                    role: auth::Role::Buyer,
                    session: holder.session,
                    registered_at: None,
                })
            });
        }
        Ok(())
    });
    desks
}

/// The identity provider beside our own accounts, if there is one.
fn outside(config: &Config, life: &Lifecycle) -> anyhow::Result<Option<Arc<Outside>>> {
    let (Some(keys_url), Some(issuer), Some(audience)) =
        (&config.jwks_url, &config.jwt_issuer, &config.jwt_audience)
    else {
        return Ok(None);
    };
    let list = |text: &str| {
        let words = text.split(',').map(str::trim);
        words
            .filter(|word| !word.is_empty())
            .map(str::to_owned)
            .collect()
    };
    let pointer = |claim: &str| {
        if claim.starts_with('/') {
            claim.to_owned()
        } else {
            format!("/{claim}")
        }
    };
    let provider = Provider {
        keys_url: keys_url.clone(),
        issuer: issuer.clone(),
        audience: audience.clone(),
        roles: pointer(&config.jwt_role_claim),
        registered_at: pointer(&config.jwt_registered_claim),
        operators: list(&config.jwt_operator_roles),
        admins: list(&config.jwt_admin_roles),
    };
    let outside = Arc::new(Outside::new(provider).context("STOCKADE_JWKS_URL")?);
    let (keys, stop) = (Arc::clone(&outside), life.token(Stage::Background));
    life.spawn(Stage::Background, "identity provider", async move {
        keys.run(stop).await;
        Ok(())
    });
    Ok(Some(outside))
}

/// How the crowd is let in.
fn door(
    config: &Config,
    files: &Files,
    metrics: &Metrics,
    life: &Lifecycle,
) -> anyhow::Result<Door> {
    let tls = match (&config.tls_cert, &config.tls_key) {
        (Some(certificate), Some(key)) => {
            let tls = Tls::load(certificate.clone(), key.clone())
                .context("STOCKADE_TLS_CERT and STOCKADE_TLS_KEY")?;
            life.spawn(Stage::Background, "certificate", {
                reload(tls.clone(), life.token(Stage::Background))
            });
            Some(tls)
        }
        _ => None,
    };
    let quarter = files.connections / ADDRESS_SHARE;
    Ok(Door {
        connections: files.connections,
        per_address: match config.rate_limit {
            RateLimit::On => config.connections_per_address.unwrap_or(quarter),
            RateLimit::Off => usize::MAX,
        },
        uncounted: vec![
            config.trusted_proxies.clone(),
            config.unlimited_addresses.clone(),
        ],
        tls,
        metrics: metrics.limits.clone(),
    })
}

/// Reads the certificate again upon SIGHUP, until `stop`.
async fn reload(tls: Tls, stop: CancellationToken) -> anyhow::Result<()> {
    let mut hangup = signal(SignalKind::hangup())?;
    while let Some(Some(())) = stop.run_until_cancelled(hangup.recv()).await {
        match tls.reload() {
            Ok(()) => tracing::info!("the certificate was read again"),
            Err(error) => tracing::error!(%error, "the certificate stays as it was"),
        }
    }
    Ok(())
}

/// The limits, unless they are off.
fn throttle(
    config: &Config,
    secret: &[u8],
    stores: &Stores,
    metrics: &Metrics,
    life: &Lifecycle,
) -> anyhow::Result<Throttle> {
    if config.rate_limit == RateLimit::Off {
        return Ok(Throttle::off());
    }
    let settings = ThrottleSettings {
        allowances: config.limits.clone(),
        unlimited: config.unlimited_addresses.clone(),
        secret: secret.to_vec(),
    };
    let (throttle, sharing) =
        Throttle::new(settings, stores.cache.clone(), metrics.limits.clone())?;
    let stop = life.token(Stage::Background);
    life.spawn(Stage::Background, "limits", async move {
        sharing.run(stop).await;
        Ok(())
    });
    Ok(throttle)
}

/// The gateways that the configuration has, and the toy bank by itself: it has to be asked for its
/// webhooks.
fn gateways(
    config: &Config,
    database: &Database,
) -> anyhow::Result<(Gateways, Option<Arc<Sandbox>>)> {
    let mut gateways = Gateways::new();
    let embedded = matches!(config.stores(), Ok(Source::Embedded));
    let sandbox = match (config.sandbox, &config.jwt_secret) {
        (Some(Switch::Off), _) | (None, None) => None,
        (None, _) if !embedded => None,
        (Some(Switch::On) | None, secret) => {
            let secret = secret.as_ref().context("STOCKADE_JWT_SECRET is not set")?;
            let secret = format!("sandbox webhooks {}", secret.expose_secret());
            let sandbox = Arc::new(Sandbox::new(
                ToyBank::new(database.clone()),
                SecretString::from(secret),
            ));
            gateways.add(
                GatewayName::Sandbox,
                Arc::clone(&sandbox) as Arc<dyn Gateway>,
            );
            Some(sandbox)
        }
    };
    if let (Some(key), Some(secrets)) = (&config.stripe_secret_key, &config.stripe_webhook_secret) {
        let settings = StripeSettings {
            url: config.stripe_url.clone(),
            secret_key: key.clone(),
            webhook_secrets: secrets
                .expose_secret()
                .split(',')
                .map(|secret| SecretString::from(secret.trim()))
                .collect(),
            return_url: config.payment_return_url.clone(),
        };
        let stripe = Stripe::new(settings).context("Stripe cannot be reached over TLS")?;
        gateways.add(GatewayName::Stripe, Arc::new(stripe));
    }
    if let (Some(id), Some(secret), Some(webhook)) = (
        &config.paypal_client_id,
        &config.paypal_client_secret,
        &config.paypal_webhook_id,
    ) {
        let settings = PaypalSettings {
            url: config.paypal_url.clone(),
            client_id: id.clone(),
            client_secret: secret.clone(),
            webhook_id: webhook.clone(),
            return_url: config.payment_return_url.clone(),
        };
        let paypal = Paypal::new(settings).context("PayPal cannot be reached over TLS")?;
        gateways.add(GatewayName::Paypal, Arc::new(paypal));
    }
    Ok((gateways, sandbox))
}

/// Makes the configured operator, if there is none with that address. Gives the password that was
/// generated for it, if none was configured.
async fn operator(config: &Config, accounts: &Accounts) -> anyhow::Result<Option<SecretString>> {
    let Some(address) = &config.operator_email else {
        return Ok(None);
    };
    let email =
        Email::parse(address).context("STOCKADE_OPERATOR_EMAIL is not an e-mail address")?;
    if accounts.users.by_email(email.as_str()).await?.is_some() {
        return Ok(None);
    }
    let (password, generated) = match &config.operator_password {
        Some(password) => (password.clone(), None),
        None => {
            let password = SecretString::from(auth::session::RefreshToken::random()?.text());
            (password.clone(), Some(password))
        }
    };
    auth::password::check(password.expose_secret())
        .context("STOCKADE_OPERATOR_PASSWORD is too weak")?;
    let password = password.expose_secret().to_owned();
    let name = "Operator".to_owned();
    match accounts
        .register(email, name, password, auth::Role::Operator)
        .await
    {
        Ok(_) => Ok(generated),
        // Another node was faster.
        Err(AccountError::EmailTaken) => Ok(None),
        Err(error) => Err(error).context("the operator could not be created"),
    }
}

async fn access_log(config: &Config, metrics: &Metrics) -> anyhow::Result<AccessLog> {
    let format = match config.access_log {
        config::AccessLog::Off => return Ok(AccessLog::off()),
        config::AccessLog::Combined => http::Format::Combined,
        config::AccessLog::Json => http::Format::Json,
    };
    let (log, writer) = AccessLog::new(format, metrics.http.clone());
    // It ends with the last router that writes to it.
    match &config.access_log_file {
        Some(path) => {
            let file = tokio::fs::OpenOptions::new()
                .create(true)
                .append(true)
                .open(path)
                .await;
            let file = file.with_context(|| format!("cannot open {}", path.display()))?;
            tokio::spawn(writer.run(file));
        }
        None => {
            tokio::spawn(writer.run(tokio::io::stdout()));
        }
    }
    Ok(log)
}

/// How the files that this process may open are shared out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Files {
    /// Connections to the public listener.
    connections: usize,
    /// Those of them that may be event streams.
    streams: usize,
}

impl Files {
    /// By the limit of this process, when so many are connections to PostgreSQL.
    fn of_this_process(pool: u32) -> Self {
        let limit = getrlimit(Resource::Nofile).current;
        Self::shared_out(limit.unwrap_or(u64::MAX), pool)
    }

    /// Under a limit that is far too low everybody gets half.
    fn shared_out(limit: u64, pool: u32) -> Self {
        let connections = limit
            .saturating_sub(OWN_FILES + u64::from(pool))
            .max(limit / 2);
        let streams = connections - connections.div_ceil(BUYERS_SHARE);
        let count = |files: u64| usize::try_from(files).unwrap_or(usize::MAX);
        Self {
            connections: count(connections),
            streams: count(streams),
        }
    }
}

/// Binds with a long queue: what does not fit into it is dropped by the kernel, and tries again a
/// second later.
fn bind(addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = match addr {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    // A node that starts again must not wait for what is left of its last connections.
    socket.set_reuseaddr(true)?;
    socket.bind(addr)?;
    socket.listen(ACCEPT_QUEUE)
}

/// Listens, and lets people in as the door says.
fn listen(
    addr: SocketAddr,
    router: Router,
    door: Door,
    name: &'static str,
    life: &Lifecycle,
) -> anyhow::Result<SocketAddr> {
    let listener = bind(addr).with_context(|| format!("cannot listen on {addr}"))?;
    let addr = listener.local_addr()?;
    let stop = life.token(Stage::Requests);
    life.spawn(Stage::Requests, name, async move {
        let too_slow = async {
            stop.cancelled().await;
            tokio::time::sleep(LAST_ANSWERS).await;
        };
        tokio::select! {
            () = http::serve(listener, router, door, stop.clone()) => {}
            // Somebody reads his answer so slowly that the writer would not get to drain.
            () = too_slow => {}
        }
        Ok(())
    });
    Ok(addr)
}

/// Shows how the process is doing: gauges and `/readyz`.
struct Look {
    engines: Engines,
    database: Database,
    metrics: Arc<Metrics>,
    readiness: Readiness,
    /// Whether what PostgreSQL commits survives a power loss, for those who promise it.
    keeps: watch::Sender<Result<(), Lack>>,
    /// Whether there are replicas to wait for.
    replicated: bool,
    statuses: Vec<(Partition, watch::Receiver<crate::writer::WriterStatus>)>,
}

impl Look {
    /// What sales can promise at the moment, or which of them cannot keep what they do.
    fn durability(&self) -> Result<Option<String>, String> {
        let mut lacks = BTreeSet::new();
        let mut worth = BTreeSet::new();
        for engine in self.engines.all() {
            match engine.gives(Mode::Default) {
                Ok(durability) if engine.settings().unverified() => {
                    worth.insert(format!("{}, not verified", durability.as_str()));
                }
                Ok(durability) => {
                    worth.insert(durability.as_str().to_owned());
                }
                Err(lack) => {
                    lacks.insert(format!("nothing is sold: {lack}"));
                    continue;
                }
            }
            if self.replicated
                && let Err(lack) = engine.gives(Mode::Replicated)
            {
                lacks.insert(format!("no sale with `replicated` sells: {lack}"));
            }
        }
        if let Err(lack) = &*self.keeps.borrow() {
            lacks.insert(format!("no sale with `committed` sells: {lack}"));
        }
        let holds = lacks.is_empty();
        let words: Vec<_> = worth.into_iter().chain(lacks).collect();
        let words = words.join("; ");
        if holds { Ok(Some(words)) } else { Err(words) }
    }

    /// One store that does not answer must not keep the other from being looked at.
    async fn again_and_again(&self) {
        let postgres = async {
            loop {
                self.postgres().await;
                tokio::time::sleep(LOOK).await;
            }
        };
        let others = async {
            loop {
                self.others().await;
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::select! {
            () = postgres => {}
            () = others => {}
        }
    }

    async fn postgres(&self) {
        match self.database.migrated().await {
            Ok(true) => self.readiness.pass("postgresql"),
            Ok(false) => self.readiness.fail("postgresql", "not migrated"),
            Err(_) => {
                // What it said of itself still counts: nothing is committed meanwhile.
                self.readiness.fail("postgresql", "does not answer");
                return;
            }
        }
        if let Ok(settings) = self.database.settings().await {
            self.keeps.send_modify(|kept| *kept = settings.keeps());
        }
    }

    async fn others(&self) {
        let settings = self.engines.all().iter().map(Engine::read_settings);
        let danger = match futures::future::try_join_all(settings).await {
            Ok(_) => self
                .engines
                .all()
                .iter()
                .find_map(|engine| engine.settings().danger()),
            Err(_) => Some("does not answer".to_owned()),
        };
        match danger {
            Some(danger) => self.readiness.fail("redis", danger),
            None => self.readiness.pass("redis"),
        }
        self.readiness.inform("durability", self.durability());
        let mut fenced = Vec::new();
        let mut redis_ms = None;
        for engine in self.engines.all() {
            let labels = PartitionLabels {
                partition: engine.partition().0,
            };
            let is_fenced = matches!(&*engine.fence().borrow(), Fence::Fenced(_));
            if is_fenced {
                fenced.push(engine.partition().to_string());
            }
            redis_ms = redis_ms.or(engine.redis_ms());
            let engine_metrics = &self.metrics.engine;
            engine_metrics
                .fenced
                .get_or_create(&labels)
                .set(is_fenced.into());
            let waiting = i64::try_from(engine.waiting()).unwrap_or(i64::MAX);
            engine_metrics.waiting.get_or_create(&labels).set(waiting);
            for mode in Mode::ALL {
                let labels = DurabilityLabels {
                    partition: engine.partition().0,
                    durability: mode.as_str(),
                };
                let kept = mode != Mode::Committed || self.keeps.borrow().is_ok();
                let durable = kept && engine.gives(mode).is_ok();
                let gauge = engine_metrics.durable.get_or_create(&labels);
                gauge.set(durable.into());
            }
        }
        if fenced.is_empty() {
            self.readiness.pass("partitions");
        } else {
            let reason = format!("{} not verified: nothing is sold", fenced.join(", "));
            self.readiness.fail("partitions", reason);
        }
        for (partition, status) in &self.statuses {
            let status = status.borrow();
            let labels = PartitionLabels {
                partition: partition.0,
            };
            let writer = &self.metrics.writer;
            let count = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
            writer
                .lag_entries
                .get_or_create(&labels)
                .set(count(status.lag_entries));
            let lag = redis_ms.map_or(0.0, |now_ms| status.lag_seconds(now_ms));
            writer.lag_seconds.get_or_create(&labels).set(lag);
            writer
                .position
                .get_or_create(&labels)
                .set(count(status.position.pseq));
            let halted = matches!(status.state, State::Halted(_));
            writer.halted.get_or_create(&labels).set(halted.into());
            writer
                .orders
                .get_or_create(&labels)
                .set(count(status.orders_total));
            writer
                .dead_letters
                .get_or_create(&labels)
                .set(count(status.letters_total));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_kept_back_for_the_stores_and_for_buyers() {
        for (limit, connections, streams) in
            [(20_000, 19_856, 19_235), (1_024, 880, 852), (100, 50, 48)]
        {
            let files = Files {
                connections,
                streams,
            };
            assert_eq!(Files::shared_out(limit, 16), files, "{limit}");
        }
        let files = Files::shared_out(u64::MAX, 16);
        assert!(files.streams < files.connections);
    }
}
