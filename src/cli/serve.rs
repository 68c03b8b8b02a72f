//! `stockade serve`: the stores, then the application, until a signal; then both in the opposite order.

use std::io::{self, Write};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use secrecy::ExposeSecret;
use stockade::app::{self, App, Role};
use stockade::config::{Config, Endpoints, Networks, RateLimit, Stores};
use stockade::embedded::{self, EmbeddedConfig, Services};
use stockade::faults;
use stockade::lifecycle::Lifecycle;

use super::demo;

/// The operator of an embedded installation that configures none.
const EMBEDDED_OPERATOR: &str = "operator@stockade.example";

/// Serves until a signal, or until something that it cannot do without ends.
pub(super) fn run(config: Config, roles: &[Role], demo: bool) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?
        .block_on(serve(config, roles, demo))
}

/// Lets this process hold as many connections as the system allows it: the default of 1024 is less
/// than a crowd.
fn raise_open_files() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "the limit of open files stays where it is");
    }
}

async fn serve(mut config: Config, roles: &[Role], demo: bool) -> anyhow::Result<()> {
    let stores = config.check_for_serve()?;
    if demo && config.unlimited_addresses.is_empty() {
        // Its crowd comes from this machine: `make drop`.
        config.unlimited_addresses = Networks::loopback();
    }
    if config.rate_limit == RateLimit::Off {
        tracing::warn!("STOCKADE_RATE_LIMIT=off: every limit is off, for benchmarks only");
    }
    if faults::ENABLED {
        tracing::error!(
            "this is a TEST BUILD with the feature `faults`: it may be told to die or to be wrong. \
             Never sell anything with it"
        );
    }
    raise_open_files();
    let life = Lifecycle::new();
    life.listen_to_signals()?;

    let (endpoints, services) = match stores {
        Stores::External(endpoints) => (endpoints, None),
        Stores::Embedded => {
            let embedded_config = EmbeddedConfig {
                data_dir: config.data_dir.clone(),
                database_pool: config.database_pool,
            };
            let services = tokio::select! {
                services = Services::start(&embedded_config) => services?,
                // Dropped, a start half done asks its services to end.
                () = life.stopping() => return Ok(()),
            };
            if config.jwt_secret.is_none() {
                config.jwt_secret = Some(embedded::jwt_secret(&config.data_dir)?);
            }
            config
                .operator_email
                .get_or_insert_with(|| EMBEDDED_OPERATOR.to_owned());
            (services.endpoints().clone(), Some(services))
        }
    };
    tracing::info!(
        embedded = services.is_some(),
        cache = endpoints.cache_redis_url.is_some(),
        "stores are ready"
    );

    let outcome = application(&config, &endpoints, roles, demo, &life).await;
    if let Some(services) = services {
        services.shutdown(life.hard()).await;
    }
    tracing::info!("stopped");
    outcome
}

async fn application(
    config: &Config,
    endpoints: &Endpoints,
    roles: &[Role],
    demo: bool,
    life: &Lifecycle,
) -> anyhow::Result<()> {
    let started = tokio::select! {
        app = app::start(config, endpoints, roles, life) => app,
        () = life.stopping() => return Ok(()),
    };
    let ready = match started {
        Ok(app) => ready(config, &app, demo).await,
        Err(error) => Err(error),
    };
    if ready.is_err() {
        life.stop();
    }
    // What has started ends in order, also when something else could not start.
    let outcome = life.run().await;
    ready?;
    Ok(outcome?)
}

/// Seeds what a demonstration needs, and says where everything is.
async fn ready(config: &Config, app: &App, demo: bool) -> anyhow::Result<()> {
    if demo && let Some(shop) = &app.shop {
        demo::seed(shop, &app.products).await?;
    }
    let scheme = if config.tls_cert.is_some() {
        "https"
    } else {
        "http"
    };
    let mut out = io::stdout().lock();
    if let Some(addr) = app.http_addr {
        writeln!(
            out,
            "stockade serves {scheme}://{addr} (API below /v1, documentation at /docs)"
        )?;
    }
    if let Some(addr) = app.admin_addr {
        writeln!(out, "operators: {scheme}://{addr}")?;
    }
    if demo {
        writeln!(
            out,
            "demonstration: requests from {} are not counted per address",
            config.unlimited_addresses
        )?;
    }
    if let Some(email) = &config.operator_email {
        match &app.generated_password {
            Some(password) => writeln!(
                out,
                "operator: {email}, password {} (shown this once)",
                password.expose_secret()
            )?,
            None => writeln!(out, "operator: {email}, with the password it was made with")?,
        }
    }
    out.flush()?;
    Ok(())
}
