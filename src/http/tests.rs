//! The whole router without its stores, and what the other tests of this folder send through it.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    num::NonZeroUsize,
    sync::Arc,
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    extract::Request,
    http::{
        HeaderMap, HeaderValue, Method, StatusCode,
        header::{
            ACCESS_CONTROL_ALLOW_ORIGIN, AUTHORIZATION, CONTENT_SECURITY_POLICY, CONTENT_TYPE,
            ORIGIN,
        },
    },
};
use serde_json::Value;
use tokio::sync::{Notify, watch};
use tower::ServiceExt;
use utoipa_axum::router::OpenApiRouter;
use uuid::Uuid;

use super::{
    AccessLog, HttpSettings, HttpState, Listener, Parts,
    edge::{Edge, EdgeLayer},
    limit::Charge,
    problem::{Code, MEDIA_TYPE},
    resources, router,
    routes::{Access, Name, Names, mount, operations},
};
use crate::{
    auth::{
        Role,
        accounts::Accounts,
        api_key::ApiKeys,
        barred::Barred,
        bearer::Bearers,
        password::PasswordHasher,
        session::Successors,
        ticket::Tickets,
        token::{
            Identity,
            tests::{SECRET, keys},
        },
    },
    catalogue::{Catalogue, Painter},
    clock,
    config::Networks,
    domain::{proof::ProofKey, receipt::ReceiptKeys},
    engine::{Cache, Engines},
    metrics::{CatalogueMetrics, Metrics},
    ops::{
        audit_log::{AuditTrail, Weight},
        auditor::Auditor,
    },
    payments::Gateways,
    readiness::Readiness,
    realtime::{Desks, Hub, OwnLimits},
    sales::{
        Archive, BuyerNames, Checkouts, Commits, Demand, Gate, OpenSales, Pseudonyms, Shop, Till,
    },
    store::{
        Database, DatabaseSettings, api_keys::ApiKeyTable, audit_log::AuditLog, carts::Carts,
        directory::Directory, endings::Endings, epochs::Epochs, images::Images,
        incidents::Incidents, journal::Positions, orders::Orders, payments::Payments,
        personal::Personal, products::Products, profiles::Profiles, refusals::Refusals,
        reports::Reports, rounds::Rounds, sales::Sales, schedules::Schedules, sessions::Sessions,
        users::Users,
    },
    throttle::{Class, Throttle},
};

/// An answer, read to its end.
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) text: String,
    /// The text as JSON; null when it is none.
    pub(super) body: Value,
}

impl Answer {
    pub(super) async fn of(router: Router, request: Request) -> Self {
        let (parts, body) = router.oneshot(request).await.unwrap().into_parts();
        let bytes = axum::body::to_bytes(body, usize::MAX).await.unwrap();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let body = serde_json::from_str(&text).unwrap_or(Value::Null);
        Self {
            status: parts.status,
            headers: parts.headers,
            text,
            body,
        }
    }

    pub(super) async fn get(router: Router, method: Method, uri: &str) -> Self {
        let request = Request::builder()
            .method(method)
            .uri(uri)
            .body(Body::empty())
            .unwrap();
        Self::of(router, request).await
    }

    /// Asserts that it is this problem, as every problem looks.
    pub(super) fn is_problem(&self, status: StatusCode, code: Code) {
        assert_eq!(self.status, status, "{}", self.text);
        assert_eq!(self.headers[CONTENT_TYPE], MEDIA_TYPE);
        assert_eq!(self.body["code"], code.meaning().word);
        assert_eq!(self.body["status"], status.as_u16());
        assert_eq!(
            self.body["type"],
            format!("/docs/problems/{}", code.meaning().word)
        );
        for member in ["title", "detail", "instance", "outcome", "retry"] {
            assert!(self.body[member].is_string(), "{member}");
        }
    }
}

fn plain() -> HttpSettings {
    HttpSettings {
        cors_origins: Vec::new(),
        request_timeout: Duration::from_secs(5),
        access_log: AccessLog::off(),
        trusted_proxies: Networks::default(),
        throttle: Throttle::off(),
        tls: false,
    }
}

/// A router with the edge around it.
pub(super) fn edged(router: Router) -> Router {
    edged_within(router, Duration::from_secs(5))
}

/// A router with the edge around it, for handlers that take longer than `timeout`.
pub(super) fn edged_within(router: Router, timeout: Duration) -> Router {
    let settings = HttpSettings {
        request_timeout: timeout,
        ..plain()
    };
    let edge = Edge::new(
        settings,
        Metrics::new().http,
        AuditTrail::off(),
        Names::new(),
    );
    router.layer(EdgeLayer(Arc::new(edge)))
}

/// A shop whose engines are away.
fn closed_shop(database: Database) -> Shop {
    let (orders, positions) = (
        Orders::new(database.clone()),
        Positions::new(database.clone()),
    );
    let (_, kept) = watch::channel(Ok(()));
    Shop {
        commits: Commits::new(positions.clone(), orders.clone(), kept, []),
        engines: Engines::new(Vec::new()),
        directory: Directory::new(database.clone()),
        sales: Sales::new(database.clone()),
        rounds: Rounds::new(database.clone()),
        schedules: Schedules::new(database.clone()),
        archive: Archive::new(orders.clone()),
        names: BuyerNames::new(Profiles::new(database.clone())),
        demand: Demand::new(Refusals::new(database.clone())),
        open: OpenSales::new(Sales::new(database.clone()), CatalogueMetrics::default()),
        orders,
        epochs: Epochs::new(database),
        positions,
        stored: HashMap::new(),
        pseudonyms: Pseudonyms::new(SECRET).unwrap(),
        gate: Gate::new(ProofKey::new(SECRET).unwrap()),
        receipts: ReceiptKeys::new(&[(1, SECRET)]).unwrap(),
    }
}

/// The real router, whose database does not answer.
fn app(listener: Listener) -> Router {
    app_with(listener, AuditTrail::off())
}

/// The same, with a trail of its own.
fn app_with(listener: Listener, audit_trail: AuditTrail) -> Router {
    let settings = DatabaseSettings {
        acquire_timeout: Duration::from_millis(200),
        ..DatabaseSettings::default()
    };
    // The port of the discard service, where nothing listens.
    let database = Database::new("postgres://nobody@127.0.0.1:9/none", settings).unwrap();
    let metrics = Arc::new(Metrics::new());
    let tokens = Arc::new(keys());
    let passwords =
        PasswordHasher::new(4, NonZeroUsize::MIN, 4, metrics.passwords.clone()).unwrap();
    let barred = Barred::new(Sessions::new(database.clone()), metrics.identity.clone());
    let barred = Arc::new(barred);
    let api_keys = ApiKeys::new(ApiKeyTable::new(database.clone()), metrics.identity.clone());
    let api_keys = Arc::new(api_keys);
    let bearers = Arc::new(Bearers::new(
        Arc::clone(&tokens),
        Arc::clone(&api_keys),
        None,
        Arc::clone(&barred),
    ));
    let accounts = Accounts {
        barred: Arc::clone(&barred),
        api_keys: Arc::clone(&api_keys),
        users: Users::new(database.clone(), Arc::default()),
        personal: Personal::new(database.clone()),
        sessions: Sessions::new(database.clone()),
        passwords,
        tokens,
        successors: Arc::new(Successors::new(SECRET).unwrap()),
    };
    let engines = Engines::new(Vec::new());
    let directory = Directory::new(database.clone());
    let sales = Sales::new(database.clone());
    let realtime = metrics.realtime.clone();
    let hub = Hub::new(engines.clone(), directory.clone(), sales, 8, realtime);
    let tickets = Tickets::new(SECRET, Cache::default(), Arc::clone(&barred)).unwrap();
    let state = HttpState::new(Parts {
        api_keys,
        bearers,
        accounts,
        products: Products::new(database.clone()),
        catalogue: Catalogue::new(
            Products::new(database.clone()),
            Images::new(database.clone()),
            Cache::default(),
            CatalogueMetrics::default(),
        ),
        painter: Painter::default(),
        shop: Arc::new(closed_shop(database.clone())),
        checkouts: Checkouts {
            shop: Arc::new(closed_shop(database.clone())),
            carts: Carts::new(database.clone()),
        },
        till: Arc::new(Till {
            shop: Arc::new(closed_shop(database.clone())),
            payments: Payments::new(database.clone()),
            gateways: Gateways::new(),
            sandbox: None,
            patience: Duration::from_secs(1),
            due: Notify::new(),
        }),
        gateways: Gateways::new(),
        sandbox: None,
        audit_log: AuditLog::new(database.clone()),
        audit_trail,
        incidents: Incidents::new(database.clone()),
        endings: Endings::new(database.clone()),
        reports: Reports::new(database.clone()),
        certificate_key: None,
        auditor: Auditor::new(database.clone(), engines.clone()),
        desks: Desks::new(
            engines,
            directory,
            Orders::new(database),
            hub.clone(),
            OwnLimits {
                streams: 8,
                per_user: 8,
            },
        ),
        hub,
        tickets,
        metrics,
        readiness: Readiness::new(&["postgresql"]),
    });
    let settings = HttpSettings {
        cors_origins: vec![HeaderValue::from_static("https://shop.example.org")],
        ..plain()
    };
    router(state, &settings, listener)
}

/// What is charged is decided by rules; these are the routes for which another decision than the
/// general one is taken, and some for which none is.
#[test]
fn requests_are_charged_as_what_they_are() {
    let (_, names) = mount(OpenApiRouter::default(), resources(), Listener::All);
    let (one, many) = (1, 10);
    for (path, reading, changing) in [
        ("/livez", None, None),
        ("/readyz", None, None),
        ("/metrics", None, None),
        ("/v1/sales/{id}/orders", None, Some((Class::Purchase, one))),
        ("/api/sales/{id}/orders", None, Some((Class::Purchase, one))),
        ("/v1/cart/checkout", None, Some((Class::Purchase, one))),
        (
            "/v1/sales/{id}/waitlist",
            Some((Class::Read, one)),
            Some((Class::Purchase, one)),
        ),
        ("/v1/orders/{id}/cancel", None, Some((Class::Write, one))),
        ("/v1/auth/login", None, Some((Class::Login, one))),
        ("/v1/auth/register", None, Some((Class::Register, one))),
        ("/v1/auth/refresh", None, Some((Class::Write, one))),
        ("/v1/auth/password", None, Some((Class::Write, many))),
        ("/v1/webhooks/{gateway}", None, Some((Class::Webhook, one))),
        ("/v1/events", Some((Class::Stream, one)), None),
        ("/v1/sales/{id}/events", Some((Class::Stream, one)), None),
        ("/v1/me/events", Some((Class::Stream, one)), None),
        (
            "/v1/sales/{id}",
            Some((Class::Read, one)),
            Some((Class::Operate, one)),
        ),
        ("/v1/sales/{id}/pause", None, Some((Class::Operate, one))),
        (
            "/v1/sales/{id}/orders.csv",
            Some((Class::Operate, many)),
            None,
        ),
    ] {
        let charged = |charge: Option<Charge>| charge.map(|charge| (charge.class, charge.cost));
        let known = &names[path];
        let found = (charged(known.reading), charged(known.changing));
        assert_eq!(found, (reading, changing), "{path}");
    }
    let free = |known: &&Name| known.reading.is_none() && known.changing.is_none();
    let free: HashSet<_> = names
        .values()
        .filter(free)
        .map(|known| &*known.route)
        .collect();
    assert!(
        free.iter().all(|path| !path.starts_with("/v1/")),
        "{free:?}"
    );
}

/// Every operation: its method, a path that could exist, and who may use it.
fn all_operations() -> Vec<(Method, String, Access)> {
    let mut found = Vec::new();
    for mut route in resources()
        .into_iter()
        .flat_map(super::routes::Routes::into_iter)
    {
        let access = route.access;
        for (path, item) in route.paths() {
            let path = path
                .replace("{id}", &Uuid::nil().to_string())
                .replace("{round}", "1")
                .replace("{image}", &Uuid::nil().to_string())
                .replace("{file}", &format!("{}.jpg", "0".repeat(64)));
            for (method, operation) in [
                (Method::GET, &item.get),
                (Method::PUT, &item.put),
                (Method::POST, &item.post),
                (Method::PATCH, &item.patch),
                (Method::DELETE, &item.delete),
            ] {
                if operation.is_some() {
                    found.push((method, path.clone(), access));
                }
            }
        }
    }
    found
}

async fn with_role(router: Router, method: Method, uri: &str, role: Option<Role>) -> Answer {
    let mut request = Request::builder().method(method).uri(uri);
    if let Some(role) = role {
        let identity = Identity {
            user: Uuid::from_u128(1),
            role,
            session: None,
            registered_at: None,
        };
        let token = keys()
            .mint(identity, clock::new_id(), clock::now())
            .unwrap();
        request = request.header(AUTHORIZATION, format!("Bearer {token}"));
    }
    Answer::of(router, request.body(Body::empty()).unwrap()).await
}

#[tokio::test]
async fn every_operation_is_guarded_as_it_says_under_both_prefixes() {
    let app = app(Listener::All);
    let operations = all_operations();
    assert!(operations.len() >= 13);
    for (method, path, access) in operations {
        for path in [path.clone(), path.replacen("/v1/", "/api/", 1)] {
            let anonymous = with_role(app.clone(), method.clone(), &path, None).await;
            let buyer = with_role(app.clone(), method.clone(), &path, Some(Role::Buyer)).await;
            assert_ne!(anonymous.status, StatusCode::NOT_FOUND, "{method} {path}");
            match access {
                Access::Anyone | Access::Internal => {
                    assert_ne!(anonymous.body["code"], "unauthenticated", "{method} {path}");
                }
                Access::Caller | Access::Person => {
                    anonymous.is_problem(StatusCode::UNAUTHORIZED, Code::Unauthenticated);
                    assert_ne!(buyer.body["code"], "forbidden", "{method} {path}");
                }
                Access::Operator => {
                    anonymous.is_problem(StatusCode::UNAUTHORIZED, Code::Unauthenticated);
                    buyer.is_problem(StatusCode::FORBIDDEN, Code::Forbidden);
                }
                Access::Admin => {
                    anonymous.is_problem(StatusCode::UNAUTHORIZED, Code::Unauthenticated);
                    buyer.is_problem(StatusCode::FORBIDDEN, Code::Forbidden);
                    let as_role = |role| with_role(app.clone(), method.clone(), &path, Some(role));
                    let operator = as_role(Role::Operator).await;
                    operator.is_problem(StatusCode::FORBIDDEN, Code::Forbidden);
                    let admin = as_role(Role::Admin).await;
                    assert_ne!(admin.body["code"], "forbidden", "{method} {path}");
                }
            }
        }
    }
}

#[tokio::test]
async fn every_request_to_operators_and_every_change_of_an_account_is_noted() {
    let (trail, mut noted) = AuditTrail::shown();
    let app = app_with(Listener::All, trail);
    let mut actions = BTreeSet::new();
    for (method, path, access) in all_operations() {
        for (path, role) in [
            (path.clone(), Role::Buyer),
            (path.replacen("/v1/", "/api/", 1), Role::Operator),
        ] {
            let answer = with_role(app.clone(), method.clone(), &path, Some(role)).await;
            let account = path.contains("/auth/") || path.contains("/me");
            let wanted = matches!(access, Access::Operator | Access::Admin)
                || account && !method.is_safe()
                || path.ends_with("/me/export")
                || path.ends_with("/cancel") && role.operates();
            let entry = noted.try_recv().ok();
            assert_eq!(entry.is_some(), wanted, "{method} {path} as {role:?}");
            let Some((entry, weight)) = entry else {
                continue;
            };
            assert_eq!(weight, Weight::Counted, "nothing was changed: {entry:?}");
            assert_eq!(entry.outcome, answer.body["code"], "{method} {path}");
            let request = answer.headers[super::edge::REQUEST_ID].to_str().unwrap();
            assert_eq!(entry.request_id.as_deref(), Some(request));
            if access != Access::Anyone {
                let actor = entry.actor.unwrap();
                assert_eq!(
                    (actor.user, actor.role),
                    (Some(Uuid::from_u128(1)), role.as_str())
                );
            }
            actions.insert(entry.action);
        }
    }
    assert!(actions.contains("sales_pause") && actions.contains("accounts_login"));
    assert!(noted.try_recv().is_err());
}

#[tokio::test]
async fn the_public_listener_has_nothing_for_operators() {
    let app = app(Listener::Public);
    for (method, path, access) in all_operations() {
        let answer = with_role(app.clone(), method.clone(), &path, Some(Role::Operator)).await;
        let absent = matches!(
            answer.status,
            StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED
        );
        assert_eq!(
            absent,
            matches!(access, Access::Operator | Access::Admin | Access::Internal),
            "{method} {path}"
        );
    }
}

#[tokio::test]
async fn a_database_that_is_away_is_unavailable_and_says_nothing_about_the_inside() {
    for uri in [
        "/v1/products",
        "/api/products",
        "/v1/products/0192f0c1-2345-7890-abcd-ef0123456789",
    ] {
        let answer = Answer::get(app(Listener::All), Method::GET, uri).await;
        answer.is_problem(StatusCode::SERVICE_UNAVAILABLE, Code::Unavailable);
        assert_eq!(answer.body["outcome"], "not_applied");
        for inside in ["127.0.0.1", "pool", "sqlx", "nobody", "PostgreSQL"] {
            assert!(!answer.text.contains(inside), "{}", answer.text);
        }
    }
}

#[tokio::test]
async fn nothing_is_sold_or_made_without_the_database_and_everybody_knows_it() {
    let identity = Identity {
        user: Uuid::from_u128(1),
        role: Role::Operator,
        session: None,
        registered_at: None,
    };
    let token = keys()
        .mint(identity, clock::new_id(), clock::now())
        .unwrap();
    let id = clock::new_id();
    for (uri, body) in [
        (
            format!("/v1/sales/{id}/orders"),
            r#"{"quantity": 1}"#.to_owned(),
        ),
        (
            format!("/v1/sales/{id}/restock"),
            r#"{"units": 1}"#.to_owned(),
        ),
        (format!("/v1/sales/{id}/close"), String::new()),
        (format!("/v1/orders/{id}/cancel"), String::new()),
        (
            "/v1/sales".to_owned(),
            format!(
                r#"{{"product_id": "{id}", "allocation": 1, "per_buyer_limit": 1, "opens_at": "2026-01-01T00:00:00Z"}}"#
            ),
        ),
    ] {
        let request = Request::post(&uri)
            .header(AUTHORIZATION, format!("Bearer {token}"))
            .header(CONTENT_TYPE, "application/json")
            .header("idempotency-key", "k");
        let answer = Answer::of(app(Listener::All), request.body(Body::from(body)).unwrap()).await;
        answer.is_problem(StatusCode::SERVICE_UNAVAILABLE, Code::Unavailable);
        assert_eq!(
            (&answer.body["outcome"], &answer.body["retry"]),
            (&"not_applied".into(), &"after".into()),
            "{uri}"
        );
    }
}

#[tokio::test]
async fn an_audit_without_its_stores_is_no_verdict() {
    let id = "0192f0c1-2345-7890-abcd-ef0123456789";
    for (uri, status, code) in [
        (
            format!("/v1/sales/{id}/audit"),
            StatusCode::SERVICE_UNAVAILABLE,
            Code::Unavailable,
        ),
        (
            format!("/v1/sales/{id}/audit?round=first"),
            StatusCode::BAD_REQUEST,
            Code::Validation,
        ),
        (
            "/v1/sales/1/audit".to_owned(),
            StatusCode::NOT_FOUND,
            Code::NotFound,
        ),
    ] {
        let operator = Some(Role::Operator);
        let answer = with_role(app(Listener::All), Method::GET, &uri, operator).await;
        answer.is_problem(status, code);
    }
}

#[tokio::test]
async fn readiness_says_what_is_missing() {
    let app = app(Listener::All);
    assert_eq!(
        Answer::get(app.clone(), Method::GET, "/livez").await.status,
        StatusCode::OK
    );
    let answer = Answer::get(app, Method::GET, "/readyz").await;
    answer.is_problem(StatusCode::SERVICE_UNAVAILABLE, Code::Unavailable);
    assert_eq!(answer.body["checks"][0]["name"], "postgresql");
    assert_eq!(answer.body["checks"][0]["ok"], false);
}

#[tokio::test]
async fn metrics_count_routes_by_template_and_never_by_address() {
    let app = app(Listener::All);
    for uri in ["/nowhere/1", "/nowhere/2", "/v1/me", "/api/me"] {
        Answer::get(app.clone(), Method::GET, uri).await;
    }
    let answer = Answer::get(app, Method::GET, "/metrics").await;
    assert!(
        answer.headers[CONTENT_TYPE]
            .to_str()
            .unwrap()
            .starts_with("application/openmetrics-text")
    );
    for line in [
        r#"stockade_http_requests_total{route="unmatched",method="GET",status="404"} 2"#,
        r#"stockade_http_requests_total{route="/v1/me",method="GET",status="401"} 2"#,
        r#"stockade_http_refusals_total{code="unauthenticated"} 2"#,
        r#"stockade_http_request_duration_seconds_count{route="/v1/me",method="GET"} 2"#,
        "stockade_password_queue 0",
    ] {
        assert!(answer.text.contains(line), "{line} in {}", answer.text);
    }
    assert!(answer.text.ends_with("# EOF\n") && !answer.text.contains("nowhere"));
}

#[tokio::test]
async fn every_problem_has_its_page_and_the_pages_load_nothing_from_elsewhere() {
    let app = app(Listener::All);
    for &code in Code::ALL {
        let meaning = code.meaning();
        let uri = format!("/docs/problems/{}", meaning.word);
        let page = Answer::get(app.clone(), Method::GET, &uri).await;
        assert_eq!(page.status, StatusCode::OK, "{uri}");
        assert!(
            page.headers[CONTENT_TYPE]
                .to_str()
                .unwrap()
                .starts_with("text/html")
        );
        for part in [meaning.word, "Cause", "Fix", "curl "] {
            assert!(page.text.contains(part), "{uri}: {part}");
        }
        assert!(page.text.matches("<code>").count() == page.text.matches("</code>").count());
        assert!(!page.text.contains("http://") && !page.text.contains("https://"));
    }
    Answer::get(app.clone(), Method::GET, "/docs/problems/nothing")
        .await
        .is_problem(StatusCode::NOT_FOUND, Code::NotFound);
    let index = Answer::get(app.clone(), Method::GET, "/docs/problems").await;
    assert!(
        Code::ALL
            .iter()
            .all(|code| index.text.contains(code.meaning().word))
    );
    for uri in [
        "/docs/",
        "/docs/swagger-ui-bundle.js",
        "/docs/swagger-initializer.js",
        "/docs/problems.css",
    ] {
        let answer = Answer::get(app.clone(), Method::GET, uri).await;
        assert_eq!(answer.status, StatusCode::OK, "{uri}");
        let policy = answer.headers[CONTENT_SECURITY_POLICY].to_str().unwrap();
        assert!(
            policy.contains("style-src 'self'") && !policy.contains("http"),
            "{uri}"
        );
    }
    Answer::get(app, Method::GET, "/docs/nothing")
        .await
        .is_problem(StatusCode::NOT_FOUND, Code::NotFound);
}

#[tokio::test]
async fn the_document_has_every_operation_with_its_problems() {
    let mut document = super::openapi();
    let served = Answer::get(app(Listener::All), Method::GET, "/openapi.json").await;
    assert_eq!(
        served.body["openapi"]
            .as_str()
            .unwrap()
            .rsplit_once('.')
            .unwrap()
            .0,
        "3.1"
    );
    assert_eq!(served.body, serde_json::to_value(&document).unwrap());
    for member in [
        "type", "title", "status", "detail", "instance", "code", "outcome", "retry",
    ] {
        let required = served.body["components"]["schemas"]["Problem"]["required"]
            .as_array()
            .unwrap();
        assert!(required.contains(&member.into()), "{member}");
    }
    let mut ids = Vec::new();
    for (path, item) in &mut document.paths.paths {
        for operation in operations(item) {
            ids.push(operation.operation_id.clone().unwrap());
            assert!(operation.responses.responses.contains_key("503"), "{path}");
            assert_eq!(
                operation.responses.responses.contains_key("401"),
                operation.security.is_some()
                    || path.contains("/login")
                    || path.contains("/refresh"),
                "{path}"
            );
        }
    }
    let count = ids.len();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(
        (ids.len(), count),
        (count, all_operations().len()),
        "operation ids are unique"
    );
}

#[tokio::test]
async fn only_configured_origins_are_allowed() {
    for (origin, allowed) in [
        ("https://shop.example.org", true),
        ("https://shop.example.org.evil.example", false),
        ("http://shop.example.org", false),
        ("https://SHOP.example.org", false),
        ("null", false),
    ] {
        for method in [Method::GET, Method::OPTIONS] {
            let request = Request::builder()
                .method(method)
                .uri("/livez")
                .header(ORIGIN, origin)
                .header("access-control-request-method", "GET");
            let answer = Answer::of(app(Listener::All), request.body(Body::empty()).unwrap()).await;
            let header = answer.headers.get(ACCESS_CONTROL_ALLOW_ORIGIN);
            assert_eq!(
                header.is_some_and(|value| value == origin),
                allowed,
                "{origin}"
            );
            assert!(answer.headers.contains_key(super::edge::REQUEST_ID));
        }
    }
}
