//! `stockade serve`: the stores, then the application, until a signal; then both in the opposite order.

use stockade::config::{Config, RateLimit, Stores};
use stockade::embedded::{self, EmbeddedConfig, Services};
use stockade::lifecycle::Lifecycle;

/// Serves until a signal, or until something that it cannot do without ends.
pub(super) fn run(config: Config) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?
        .block_on(serve(config))
}

async fn serve(mut config: Config) -> anyhow::Result<()> {
    let stores = config.check_for_serve()?;
    if config.rate_limit == RateLimit::Off {
        tracing::warn!("STOCKADE_RATE_LIMIT=off: every limit is off, for benchmarks only");
    }
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
            (services.endpoints().clone(), Some(services))
        }
    };
    tracing::info!(
        embedded = services.is_some(),
        cache = endpoints.cache_redis_url.is_some(),
        "stores are ready"
    );

    let outcome = life.run().await;
    if let Some(services) = services {
        services.shutdown(life.hard()).await;
    }
    tracing::info!("stopped");
    Ok(outcome?)
}
