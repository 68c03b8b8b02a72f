//! A small shop that speaks the API over real sockets and keeps everything in memory, to test the
//! harness against: it can be stopped and started, and can misbehave on purpose.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use chrono::{DateTime, SecondsFormat, Utc};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::WatchStream;
use uuid::Uuid;

use crate::clock;

/// The secret that its buyers' tokens are to be signed with.
pub(crate) const SECRET: &str = "a secret for tests, 32 bytes long";

/// What goes wrong on purpose. Purchases are counted from 1.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Faults {
    /// At this purchase the whole server stands still for so long.
    pub(crate) stands_still: Option<(usize, Duration)>,
    /// Every so many purchases the answer is lost on the way, after the effect.
    pub(crate) cuts_every: Option<usize>,
    /// Every so many purchases get 503 with an unknown outcome, after the effect.
    pub(crate) doubts_every: Option<usize>,
    /// Every so many purchases get 503 without an effect.
    pub(crate) busy_every: Option<usize>,
    /// Units that it sells beyond its stock.
    pub(crate) oversells: u64,
}

#[derive(Default)]
struct Shelf {
    sale: Uuid,
    allocation: u64,
    per_buyer_limit: u64,
    opens_at: DateTime<Utc>,
    closed: bool,
    /// In order of seq.
    orders: Vec<Sold>,
    by_key: HashMap<(Uuid, String), usize>,
}

struct Sold {
    buyer: Uuid,
    quantity: u64,
    body: String,
    accepted_at: String,
}

impl Shelf {
    fn units(&self) -> u64 {
        self.orders.iter().map(|order| order.quantity).sum()
    }

    fn show(&self) -> Value {
        let sold = self.units();
        json!({
            "id": self.sale,
            "state": if self.closed { "closed" } else { "open" },
            "allocation": self.allocation,
            "remaining": self.allocation.saturating_sub(sold),
            "held": 0,
            "sold": sold,
            "seq": self.orders.len(),
            "server_time_ms": clock::now().timestamp_millis(),
        })
    }
}

struct Inner {
    faults: Faults,
    purchases: AtomicUsize,
    shelf: Mutex<Shelf>,
    stock: watch::Sender<Value>,
}

impl Inner {
    fn shelf(&self) -> MutexGuard<'_, Shelf> {
        self.shelf.lock().unwrap()
    }
}

/// The running shop. What it sold outlives a stop, as if it were stored.
pub(crate) struct Shop {
    pub(crate) address: SocketAddr,
    inner: Arc<Inner>,
    runtime: Option<Runtime>,
}

impl Shop {
    pub(crate) fn start(faults: Faults) -> Self {
        let mut shop = Self {
            address: ([127, 0, 0, 1], 0).into(),
            inner: Arc::new(Inner {
                faults,
                purchases: AtomicUsize::new(0),
                shelf: Mutex::default(),
                stock: watch::Sender::new(Value::Null),
            }),
            runtime: None,
        };
        shop.start_again();
        shop
    }

    /// Ends it at once, with all its connections.
    pub(crate) fn stop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // On a thread of its own, because a test's own runtime must not be blocked.
            thread::spawn(move || runtime.shutdown_timeout(Duration::from_secs(5)))
                .join()
                .unwrap();
        }
    }

    /// On the same address as before.
    pub(crate) fn start_again(&mut self) {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let address = self.address;
        let router = router(Arc::clone(&self.inner));
        let (told, bound) = std::sync::mpsc::channel();
        runtime.spawn(async move {
            let listener = TcpListener::bind(address).await.unwrap();
            told.send(listener.local_addr().unwrap()).unwrap();
            axum::serve(listener, router).await.unwrap();
        });
        self.address = bound.recv().unwrap();
        self.runtime = Some(runtime);
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Puts a sale up that opens now.
    pub(crate) fn put_up(&self, sale: Uuid, allocation: u64) {
        let mut on_sale = self.inner.shelf();
        on_sale.sale = sale;
        on_sale.allocation = allocation;
        on_sale.per_buyer_limit = 1;
        on_sale.opens_at = clock::now();
        self.inner.stock.send_replace(on_sale.show());
    }

    /// Orders that exist.
    pub(crate) fn orders(&self) -> usize {
        self.inner.shelf().orders.len()
    }
}

impl Drop for Shop {
    fn drop(&mut self) {
        self.stop();
    }
}

fn router(inner: Arc<Inner>) -> Router {
    Router::new()
        .route("/readyz", get(|| async { "ready" }))
        .route(
            "/v1/products",
            post(async || created(&json!({"id": Uuid::from_u128(1)}))),
        )
        .route("/v1/sales", post(create_sale))
        .route("/v1/sales/{id}", get(sale))
        .route("/v1/sales/{id}/close", post(close))
        .route("/v1/sales/{id}/orders", post(purchase))
        .route("/v1/sales/{id}/leaderboard", get(leaderboard))
        .route("/v1/sales/{id}/audit", get(audit))
        .route("/v1/sales/{id}/events", get(events))
        .with_state(inner)
}

fn created(body: &impl ToString) -> Response {
    let json = [(header::CONTENT_TYPE, "application/json")];
    (StatusCode::CREATED, json, body.to_string()).into_response()
}

fn refused(status: StatusCode, code: &str, outcome: &str, retry: &str) -> Response {
    let body = json!({"type": format!("/docs/problems/{code}"), "title": code, "status": status.as_u16(), "code": code, "outcome": outcome, "retry": retry});
    let headers = [(header::CONTENT_TYPE, "application/problem+json")];
    (status, headers, body.to_string()).into_response()
}

async fn create_sale(State(shop): State<Arc<Inner>>, Json(wish): Json<Value>) -> Response {
    let mut shelf = shop.shelf();
    shelf.sale = Uuid::from_u128(7);
    shelf.allocation = wish["allocation"].as_u64().unwrap();
    shelf.per_buyer_limit = wish["per_buyer_limit"].as_u64().unwrap();
    shelf.opens_at = wish["opens_at"].as_str().unwrap().parse().unwrap();
    shop.stock.send_replace(shelf.show());
    created(&shelf.show())
}

async fn sale(State(shop): State<Arc<Inner>>) -> Json<Value> {
    Json(shop.shelf().show())
}

async fn close(State(shop): State<Arc<Inner>>) -> Json<Value> {
    shop.shelf().closed = true;
    sale(State(shop)).await
}

async fn audit(State(shop): State<Arc<Inner>>) -> Json<Value> {
    let shelf = shop.shelf();
    let verdict = if shelf.units() > shelf.allocation {
        "fail"
    } else {
        "pass"
    };
    let check = json!({"name": "conservation", "status": verdict, "expected": shelf.allocation, "actual": shelf.units()});
    Json(json!({"sale_id": shelf.sale, "round": 1, "verdict": verdict, "checks": [check]}))
}

async fn leaderboard(
    State(shop): State<Arc<Inner>>,
    Query(query): Query<HashMap<String, usize>>,
) -> Json<Value> {
    let shelf = shop.shelf();
    let (from, limit) = (query.get("cursor").copied().unwrap_or(0), query["limit"]);
    let places: Vec<Value> = shelf.orders.iter().enumerate().skip(from).take(limit)
        .map(|(n, order)| json!({"rank": n + 1, "buyer": format!("b{}", order.buyer.as_u128() ^ 5), "quantity": order.quantity, "accepted_at": order.accepted_at, "seq": n + 1}))
        .collect();
    let next = from + places.len();
    let has_more = next < shelf.orders.len();
    let cursor = has_more.then(|| next.to_string());
    Json(json!({"data": places, "has_more": has_more, "next_cursor": cursor}))
}

async fn events(State(shop): State<Arc<Inner>>) -> Response {
    let frames = WatchStream::new(shop.stock.subscribe()).map(|stock| {
        let frame = format!("event: stock\nid: 1-{}\ndata: {stock}\n\n", stock["seq"]);
        Ok::<_, io::Error>(frame)
    });
    let stream = [(header::CONTENT_TYPE, "text/event-stream")];
    (stream, Body::from_stream(frames)).into_response()
}

/// Whose token it is; forged ones are not what is tested here.
fn buyer(headers: &HeaderMap) -> Uuid {
    let token = headers[header::AUTHORIZATION].to_str().unwrap();
    let token = token.strip_prefix("Bearer ").unwrap();
    let key = jsonwebtoken::DecodingKey::from_secret(SECRET.as_bytes());
    let mut rules = jsonwebtoken::Validation::default();
    rules.set_audience(&["stockade"]);
    let claims = jsonwebtoken::decode::<Value>(token, &key, &rules)
        .unwrap()
        .claims;
    claims["sub"].as_str().unwrap().parse().unwrap()
}

async fn purchase(
    State(shop): State<Arc<Inner>>,
    Path(id): Path<Uuid>,
    headers: HeaderMap,
    Json(wish): Json<Value>,
) -> Response {
    let n = shop.purchases.fetch_add(1, Ordering::Relaxed) + 1;
    let every = |count: Option<usize>| count.is_some_and(|count| n.is_multiple_of(count));
    if let Some((_, pause)) = shop.faults.stands_still.filter(|(at, _)| *at == n) {
        // It is the only thread of the server: everybody waits.
        thread::sleep(pause);
    }
    if every(shop.faults.busy_every) {
        return refused(
            StatusCode::SERVICE_UNAVAILABLE,
            "unavailable",
            "not_applied",
            "same_key",
        );
    }
    let answer = decide(&shop, id, &headers, wish["quantity"].as_u64().unwrap());
    if every(shop.faults.cuts_every) {
        let cut = tokio_stream::once(Err::<String, _>(io::Error::other("cut")));
        return (answer.status(), Body::from_stream(cut)).into_response();
    }
    if every(shop.faults.doubts_every) {
        return refused(
            StatusCode::SERVICE_UNAVAILABLE,
            "unavailable",
            "unknown",
            "same_key",
        );
    }
    answer
}

fn decide(shop: &Inner, sale: Uuid, headers: &HeaderMap, quantity: u64) -> Response {
    let buyer = buyer(headers);
    let key = headers["idempotency-key"].to_str().unwrap().to_owned();
    let mut shelf = shop.shelf();
    let now = clock::now();
    if let Some(n) = shelf.by_key.get(&(buyer, key.clone())) {
        let mut answer = created(&shelf.orders[*n].body);
        let replayed = "true".parse().unwrap();
        answer
            .headers_mut()
            .insert("idempotency-replayed", replayed);
        return answer;
    }
    let theirs = shelf.orders.iter().filter(|order| order.buyer == buyer);
    let has: u64 = theirs.map(|order| order.quantity).sum();
    let left = (shelf.allocation + shop.faults.oversells).saturating_sub(shelf.units());
    let code = if now < shelf.opens_at {
        "not_open"
    } else if shelf.closed {
        "closed"
    } else if has + quantity > shelf.per_buyer_limit {
        "buyer_limit"
    } else if left == 0 {
        "sold_out"
    } else if left < quantity {
        "insufficient"
    } else {
        let (n, accepted_at) = (
            shelf.orders.len(),
            now.to_rfc3339_opts(SecondsFormat::Millis, true),
        );
        let order = json!({"id": Uuid::from_u128(n as u128 + 1000), "sale_id": sale, "round": 1, "buyer_id": buyer, "quantity": quantity, "status": "confirmed", "seq": n + 1, "accepted_at": accepted_at});
        shelf.orders.push(Sold {
            buyer,
            quantity,
            body: order.to_string(),
            accepted_at,
        });
        shelf.by_key.insert((buyer, key), n);
        shop.stock.send_replace(shelf.show());
        return created(&order);
    };
    refused(StatusCode::CONFLICT, code, "not_applied", "never")
}
