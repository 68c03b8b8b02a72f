//! The only axum code: the router on one screen, one file per resource.
//!
//! A request passes the [`edge`], then extractors in the order authentication, path, key, body,
//! then a handler of three moves: extract, call, render.

mod access_log;
mod accounts;
mod api_keys;
mod audit;
mod audit_log;
mod body;
mod caller;
mod cart;
mod certificates;
mod check;
mod checkouts;
mod client;
mod docs;
mod edge;
mod events;
mod hurdles;
mod idempotency;
mod images;
mod incidents;
mod leaderboard;
mod limit;
mod orders;
mod own_events;
mod page;
mod payments;
mod personal;
mod probes;
pub mod problem;
mod products;
mod receipts;
mod reports;
mod rounds;
mod routes;
mod sales;
mod schedule;
mod serve;
mod sessions;
mod tls;
mod trail;
mod users;
mod version;
mod waitlist;

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    extract::FromRef,
    http::{
        HeaderName, HeaderValue, Method,
        header::{
            AUTHORIZATION, CONTENT_TYPE, ETAG, IF_MATCH, IF_NONE_MATCH, LOCATION, RETRY_AFTER,
        },
    },
};
use tower_http::cors::CorsLayer;
use utoipa_axum::router::OpenApiRouter;

pub use access_log::{AccessLog, AccessLogWriter, Format};
pub use serve::{Door, serve};
pub use tls::{Tls, TlsError};

use crate::{
    auth::{accounts::Accounts, api_key::ApiKeys, bearer::Bearers, ticket::Tickets},
    catalogue::{Catalogue, Painter},
    config::Networks,
    metrics::Metrics,
    ops::{audit_log::AuditTrail, auditor::Auditor, certificate::CertificateKey},
    payments::{Gateways, Sandbox},
    readiness::Readiness,
    realtime::{Desks, Hub},
    sales::{Checkouts, Shop, Till},
    store::{
        audit_log::AuditLog, endings::Endings, incidents::Incidents, products::Products,
        reports::Reports,
    },
    throttle::Throttle,
};
use edge::{Edge, EdgeLayer};

/// What handlers work with. Each gets the parts that it names, never the whole.
#[derive(Clone)]
pub struct HttpState(Arc<Parts>);

/// The parts of [`HttpState`].
pub struct Parts {
    /// Knows who bearers are.
    pub bearers: Arc<Bearers>,
    /// Keys of machines.
    pub api_keys: Arc<ApiKeys>,
    /// Registers users and logs them in.
    pub accounts: Accounts,
    /// Products in PostgreSQL.
    pub products: Products,
    /// Products and images, as a crowd may read them.
    pub catalogue: Catalogue,
    /// Makes images.
    pub painter: Painter,
    /// Sells.
    pub shop: Arc<Shop>,
    /// Buys carts.
    pub checkouts: Checkouts,
    /// Takes payments.
    pub till: Arc<Till>,
    /// Who moves the money.
    pub gateways: Gateways,
    /// The toy bank, if it is open.
    pub sandbox: Option<Arc<Sandbox>>,
    /// Compares what Redis and PostgreSQL say of a sale.
    pub auditor: Auditor,
    /// What people did.
    pub audit_log: AuditLog,
    /// Notes what they do.
    pub audit_trail: AuditTrail,
    /// What was lost.
    pub incidents: Incidents,
    /// What became of rounds.
    pub reports: Reports,
    /// What audits found, and certificates.
    pub endings: Endings,
    /// Signs certificates.
    pub certificate_key: Option<CertificateKey>,
    /// Live stock.
    pub hub: Hub,
    /// Buyers' own events.
    pub desks: Desks,
    /// Opens them.
    pub tickets: Tickets,
    /// Shown at `/metrics`.
    pub metrics: Arc<Metrics>,
    /// Shown at `/readyz`.
    pub readiness: Readiness,
}

impl HttpState {
    /// Puts the parts together.
    pub fn new(parts: Parts) -> Self {
        Self(Arc::new(parts))
    }
}

macro_rules! parts {
    ($($field:ident: $part:ty),* $(,)?) => {$(
        impl FromRef<HttpState> for $part {
            fn from_ref(state: &HttpState) -> Self {
                state.0.$field.clone()
            }
        }
    )*};
}

parts! {
    checkouts: Checkouts,
    bearers: Arc<Bearers>,
    api_keys: Arc<ApiKeys>,
    accounts: Accounts,
    products: Products,
    catalogue: Catalogue,
    painter: Painter,
    shop: Arc<Shop>,
    till: Arc<Till>,
    gateways: Gateways,
    sandbox: Option<Arc<Sandbox>>,
    auditor: Auditor,
    audit_log: AuditLog,
    audit_trail: AuditTrail,
    incidents: Incidents,
    reports: Reports,
    endings: Endings,
    certificate_key: Option<CertificateKey>,
    hub: Hub,
    desks: Desks,
    tickets: Tickets,
    metrics: Arc<Metrics>,
    readiness: Readiness,
}

/// Who a listener is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listener {
    /// Everybody: the only listener, or the operators' own.
    All,
    /// The crowd, when the operators have a listener of their own: without their routes and
    /// without metrics.
    Public,
}

/// How requests are treated, whatever they ask for.
#[derive(Clone)]
pub struct HttpSettings {
    /// The origins whose pages may read answers, exactly as browsers send them.
    pub cors_origins: Vec<HeaderValue>,
    /// How long a handler may take.
    pub request_timeout: Duration,
    /// Where requests are logged.
    pub access_log: AccessLog,
    /// Who is believed when it says whom it speaks for.
    pub trusted_proxies: Networks,
    /// How often anything may be done.
    pub throttle: Throttle,
    /// Whether this server speaks TLS itself, and tells browsers never to come without.
    pub tls: bool,
}

/// Every resource; a new one is a file and a line here.
fn resources() -> Vec<routes::Routes> {
    vec![
        accounts::routes(),
        personal::routes(),
        sessions::routes(),
        api_keys::routes(),
        users::routes(),
        products::routes(),
        images::routes(),
        sales::routes(),
        rounds::routes(),
        orders::routes(),
        payments::routes(),
        receipts::routes(),
        leaderboard::routes(),
        reports::routes(),
        waitlist::routes(),
        hurdles::routes(),
        cart::routes(),
        checkouts::routes(),
        events::routes(),
        own_events::routes(),
        audit::routes(),
        audit_log::routes(),
        incidents::routes(),
        certificates::routes(),
        probes::routes(),
    ]
}

/// Everything that `listener` serves.
pub fn router(state: HttpState, settings: &HttpSettings, listener: Listener) -> Router {
    let api = OpenApiRouter::with_openapi(docs::openapi());
    let (api, names) = routes::mount(api, resources(), listener);
    let (api, openapi) = api.split_for_parts();
    let metrics = state.0.metrics.http.clone();
    let trail = state.0.audit_trail.clone();
    let edge = Edge::new(settings.clone(), metrics, trail, names);
    let mut router = api.with_state(state).merge(docs::router(&openapi));
    if !settings.cors_origins.is_empty() {
        router = router.layer(cors(settings.cors_origins.clone()));
    }
    router.layer(EdgeLayer(Arc::new(edge)))
}

/// The OpenAPI document of everything.
pub fn openapi() -> utoipa::openapi::OpenApi {
    let api = OpenApiRouter::with_openapi(docs::openapi());
    routes::mount(api, resources(), Listener::All)
        .0
        .into_openapi()
}

/// Exactly the configured origins; no credentials, since tokens travel in a header.
fn cors(origins: Vec<HeaderValue>) -> CorsLayer {
    CorsLayer::new()
        .allow_origin(origins)
        .allow_methods([Method::GET, Method::POST, Method::PATCH, Method::DELETE])
        .allow_headers([
            AUTHORIZATION,
            CONTENT_TYPE,
            IF_MATCH,
            IF_NONE_MATCH,
            idempotency::IDEMPOTENCY_KEY,
            hurdles::PROOF_OF_WORK,
            edge::REQUEST_ID,
            HeaderName::from_static("last-event-id"),
        ])
        .expose_headers([
            ETAG,
            LOCATION,
            RETRY_AFTER,
            limit::RATE_LIMIT,
            limit::RATE_LIMIT_POLICY,
            idempotency::IDEMPOTENCY_REPLAYED,
            edge::REQUEST_ID,
        ])
        .max_age(Duration::from_mins(10))
}

#[cfg(test)]
mod tests;
