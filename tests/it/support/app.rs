//! A whole application on stores of its own, spoken to over HTTP.

use std::{sync::Arc, time::Duration};

use reqwest::{Client, Method, RequestBuilder, StatusCode, header::HeaderMap};
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Value, json};
use stockade::{
    app::{self, Role},
    auth::{
        self,
        token::{Identity, Secret, TokenKeys},
    },
    clock,
    config::{Config, Endpoints},
    embedded::RedisOptions,
    lifecycle::Lifecycle,
    sales::Shop,
};
use tokio::{
    sync::watch,
    task::{JoinHandle, JoinSet},
};
use uuid::Uuid;

use super::{Postgres, Redis, proxy::Proxy, shim::Shim};

pub(crate) const SECRET: &str = "a secret of the tests, 32 bytes!";

/// How long anything may take that must happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// An application, its stores, and what is needed to speak to it.
pub(crate) struct App {
    pub(crate) redis: Redis,
    /// Its own, if it is not in the one that all tests share.
    pub(crate) postgres: Option<Postgres>,
    /// Straight to PostgreSQL, for a test's own questions.
    pub(crate) database_url: SecretString,
    /// The Redis that holds what may be lost, if there is one.
    pub(crate) cache: Option<SecretString>,
    /// What its nodes go through to Redis and to PostgreSQL, if anything.
    pub(crate) proxies: Option<Proxies>,
    pub(crate) client: Client,
    pub(crate) url: String,
    pub(crate) operator: Uuid,
    settings: Vec<(String, String)>,
    node: Option<Node>,
    /// Where it answers: another port after each start.
    door: watch::Sender<String>,
    keys: Arc<TokenKeys>,
    audited: bool,
}

/// The ways to the stores.
pub(crate) struct Proxies {
    pub(crate) redis: Proxy,
    pub(crate) postgres: Proxy,
}

/// One process' worth of the application. Several may share the same stores.
pub(crate) struct Node {
    url: String,
    shop: Arc<Shop>,
    life: Lifecycle,
    running: JoinHandle<()>,
}

impl Node {
    /// The same request, to this node.
    pub(crate) fn ask(&self, request: RequestBuilder) -> RequestBuilder {
        redirected(request, &self.url)
    }

    /// Where it answers.
    pub(crate) fn door(&self) -> watch::Receiver<String> {
        watch::Sender::new(self.url.clone()).subscribe()
    }

    /// Stops it as SIGTERM does, and waits until its last task has ended.
    pub(crate) async fn stop(self) {
        self.life.stop();
        self.running.await.unwrap();
    }
}

/// An access token.
pub(crate) fn token(keys: &TokenKeys, user: Uuid, role: auth::Role) -> String {
    let identity = Identity {
        user,
        role,
        session: None,
        registered_at: None,
    };
    keys.mint(identity, clock::new_id(), clock::now()).unwrap()
}

/// The same request, to the port of this URL.
pub(crate) fn redirected(request: RequestBuilder, url: &str) -> RequestBuilder {
    let (client, request) = request.build_split();
    let mut request = request.unwrap();
    let port = reqwest::Url::parse(url).unwrap().port();
    request.url_mut().set_port(port).unwrap();
    RequestBuilder::from_parts(client, request)
}

/// An answer, read to its end.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) text: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|_| panic!("not JSON: {self:?}"))
    }

    /// A header's value; `None` when it is absent.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    /// The answer, which must have this status.
    #[track_caller]
    pub(crate) fn expect(self, status: u16) -> Self {
        assert_eq!(self.status, status, "{self:?}");
        self
    }
}

impl App {
    pub(crate) async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// Starts an application with settings of its own.
    pub(crate) async fn start_with(settings: &[(&str, &str)]) -> Self {
        Self::start_on(Redis::start().await, settings).await
    }

    /// Starts an application on a Redis, and waits until it is ready.
    pub(crate) async fn start_on(redis: Redis, settings: &[(&str, &str)]) -> Self {
        let mut app = Self::on(redis, settings).await;
        app.run().await;
        app
    }

    /// The stores of an application that does not run yet, and what is needed to speak to it.
    pub(crate) async fn without_node(settings: &[(&str, &str)]) -> Self {
        let (redis, database_url) = tokio::join!(Redis::start(), super::database());
        Self::with(redis, None, database_url, settings)
    }

    /// An application that does not run yet.
    pub(crate) async fn on(redis: Redis, settings: &[(&str, &str)]) -> Self {
        let database_url = super::database().await;
        Self::with(redis, None, database_url, settings)
    }

    /// Starts an application whose nodes go through proxies to their stores.
    pub(crate) async fn start_behind_proxies(seed: u64) -> Self {
        let mut app = Self::without_node(&[]).await;
        app.put_behind_proxies(seed).await;
        app.run().await;
        app
    }

    /// As [`without_node`](Self::without_node), with a PostgreSQL of its own that may be killed, and
    /// with proxies to both stores; its Redis loses power with this machine.
    pub(crate) async fn to_be_tormented(seed: u64, machine: &Shim) -> Self {
        // What is committed is written before it is told, as it must be in production.
        let settings = [("synchronous_commit", "on")];
        let on_machine = |options: &mut RedisOptions| options.environment = machine.environment();
        let (redis, postgres) =
            tokio::join!(Redis::start_with(on_machine), Postgres::start(&settings));
        let database_url = postgres.server.url().clone();
        let mut app = Self::with(redis, Some(postgres), database_url, &[]);
        app.put_behind_proxies(seed).await;
        app
    }

    async fn put_behind_proxies(&mut self, seed: u64) {
        let url = reqwest::Url::parse(self.database_url.expose_secret()).unwrap();
        self.proxies = Some(Proxies {
            redis: Proxy::before(self.redis.server.port(), seed).await,
            postgres: Proxy::before(url.port().unwrap(), !seed).await,
        });
    }

    fn with(
        redis: Redis,
        postgres: Option<Postgres>,
        database_url: SecretString,
        settings: &[(&str, &str)],
    ) -> Self {
        let keys = [Secret {
            id: "1",
            bytes: SECRET.as_bytes(),
        }];
        Self {
            redis,
            postgres,
            database_url,
            cache: None,
            proxies: None,
            client: Client::builder()
                .pool_max_idle_per_host(256)
                .build()
                .unwrap(),
            url: String::new(),
            operator: clock::new_id(),
            settings: settings
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect(),
            node: None,
            door: watch::Sender::default(),
            keys: Arc::new(TokenKeys::new(&keys, 600).unwrap()),
            audited: false,
        }
    }

    /// What every node is configured with, besides its stores.
    pub(crate) fn environment(&self) -> Vec<(String, String)> {
        let mut vars = vec![
            ("STOCKADE_HTTP_ADDR".to_owned(), "127.0.0.1:0".to_owned()),
            ("STOCKADE_JWT_SECRET".to_owned(), SECRET.to_owned()),
        ];
        // The crowds of tests come from one address. Tests of limits switch them on.
        if !self
            .settings
            .iter()
            .any(|(name, _)| name == "STOCKADE_RATE_LIMIT")
        {
            vars.push(("STOCKADE_RATE_LIMIT".to_owned(), "off".to_owned()));
        }
        vars.extend(self.settings.iter().cloned());
        vars
    }

    /// Where every node finds its stores.
    pub(crate) fn endpoints(&self) -> Endpoints {
        let mut endpoints = Endpoints {
            redis_url: self.redis.address.clone(),
            cache_redis_url: self.cache.clone(),
            database_url: self.database_url.clone(),
        };
        if let Some(proxies) = &self.proxies {
            endpoints.redis_url = proxies.redis.url(&endpoints.redis_url);
            endpoints.database_url = proxies.postgres.url(&endpoints.database_url);
        }
        endpoints
    }

    /// From now on speaks to this node, which is not the application's own.
    pub(crate) fn speak_to(&mut self, url: String) {
        self.url.clone_from(&url);
        self.door.send_replace(url);
    }

    /// Starts the application on its stores, and waits until it is ready.
    pub(crate) async fn run(&mut self) {
        let node = self.node().await;
        self.url.clone_from(&node.url);
        self.door.send_replace(node.url.clone());
        self.node = Some(node);
        self.ready().await;
    }

    /// Starts one more application on the same stores, and waits until it may sell.
    pub(crate) async fn node(&self) -> Node {
        let node = self.node_at(self.endpoints(), Role::ALL).await;
        let verified = node.shop.engines.verified();
        tokio::time::timeout(PATIENCE, verified).await.unwrap();
        node
    }

    /// Starts one more application, which finds its stores there and may not sell yet.
    pub(crate) async fn node_at(&self, endpoints: Endpoints, roles: &[Role]) -> Node {
        let config = Config::load(self.environment()).unwrap();
        let life = Lifecycle::new();
        let started = app::start(&config, &endpoints, roles, &life).await.unwrap();
        let scheme = if config.tls_cert.is_some() {
            "https"
        } else {
            "http"
        };
        Node {
            url: format!("{scheme}://{}", started.http_addr.unwrap()),
            shop: started.shop.unwrap(),
            life: life.clone(),
            running: tokio::spawn(async move { life.run().await.unwrap() }),
        }
    }

    /// Changes a setting for the next start; an empty value unsets it.
    pub(crate) fn set(&mut self, name: &str, value: &str) {
        self.settings.retain(|(known, _)| known != name);
        self.settings.push((name.to_owned(), value.to_owned()));
    }

    /// What the running application sells with, for questions that HTTP does not answer.
    pub(crate) fn shop(&self) -> &Shop {
        &self.node.as_ref().unwrap().shop
    }

    /// Where the application answers, also after the next start.
    pub(crate) fn door(&self) -> watch::Receiver<String> {
        self.door.subscribe()
    }

    /// Waits until the application wants traffic.
    pub(crate) async fn ready(&self) {
        self.until("/readyz", |answer| answer.status == 200).await;
    }

    /// Stops the application as SIGTERM does, and waits until its last task has ended.
    pub(crate) async fn stop(&mut self) {
        if let Some(node) = self.node.take() {
            node.stop().await;
        }
    }

    /// An access token.
    pub(crate) fn token(&self, user: Uuid, role: auth::Role) -> String {
        token(&self.keys, user, role)
    }

    /// What signs the access tokens.
    pub(crate) fn keys(&self) -> Arc<TokenKeys> {
        Arc::clone(&self.keys)
    }

    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, format!("{}{path}", self.url))
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        send(self.request(Method::GET, path)).await
    }

    /// A request of the operator.
    pub(crate) fn operate(&self, method: Method, path: &str) -> RequestBuilder {
        let token = self.token(self.operator, auth::Role::Operator);
        self.request(method, path).bearer_auth(token)
    }

    /// A purchase, not sent yet.
    pub(crate) fn purchase(
        &self,
        sale: &str,
        buyer: Uuid,
        key: &str,
        body: impl Into<reqwest::Body>,
    ) -> RequestBuilder {
        self.request(Method::POST, &format!("/v1/sales/{sale}/orders"))
            .bearer_auth(self.token(buyer, auth::Role::Buyer))
            .header("Idempotency-Key", key)
            .header("Content-Type", "application/json")
            .body(body)
    }

    pub(crate) async fn buy(&self, sale: &str, buyer: Uuid, key: &str, quantity: u64) -> Answer {
        send(self.purchase(
            sale,
            buyer,
            key,
            json!({ "quantity": quantity }).to_string(),
        ))
        .await
    }

    /// Makes a product and a sale of it; `terms` go into the sale's body. Gives the sale.
    pub(crate) async fn sale(&self, terms: Value) -> Value {
        let product = json!({
            "name": "Lamp", "description": "It shines.",
            "price": { "amount": 1999, "currency": "EUR" },
        });
        let product = self.operate(Method::POST, "/v1/products").json(&product);
        let product = send(product).await.expect(201).json();
        let mut body = json!({
            "product_id": product["id"], "allocation": 5, "per_buyer_limit": 2,
            "opens_at": "2020-01-01T00:00:00Z",
        });
        body.as_object_mut()
            .unwrap()
            .extend(terms.as_object().unwrap().clone());
        send(self.operate(Method::POST, "/v1/sales").json(&body))
            .await
            .expect(201)
            .json()
    }

    /// The sale as it stands.
    pub(crate) async fn view(&self, sale: &str) -> Value {
        self.get(&format!("/v1/sales/{sale}"))
            .await
            .expect(200)
            .json()
    }

    /// Asks until the answer is as wanted.
    pub(crate) async fn until(&self, path: &str, wanted: impl Fn(&Answer) -> bool) -> Answer {
        let mut last = String::from("no answer");
        let asking = async {
            loop {
                let answer = send(self.operate(Method::GET, path)).await;
                if wanted(&answer) {
                    return answer;
                }
                last = format!("{} {}", answer.status, answer.text);
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let asked = tokio::time::timeout(PATIENCE, asking).await;
        asked.unwrap_or_else(|_| panic!("{path}: too late, at last: {last}"))
    }

    /// The audit of one sale, once everything is stored.
    pub(crate) async fn audit(&self, sale: &str) -> Value {
        let path = format!("/v1/sales/{sale}/audit");
        let done =
            |answer: &Answer| answer.status == 200 && answer.json()["verdict"] != json!("pending");
        self.until(&path, done).await.json()
    }

    /// All pages of a list, as the operator sees them.
    pub(crate) async fn pages(&self, path: &str) -> Vec<Value> {
        let mut rows = Vec::new();
        let mut cursor = String::new();
        loop {
            let and = if path.contains('?') { '&' } else { '?' };
            let request = self.operate(Method::GET, &format!("{path}{and}limit=100{cursor}"));
            let page = send(request).await.expect(200).json();
            rows.extend(page["data"].as_array().unwrap().iter().cloned());
            let next = page["next_cursor"].as_str();
            assert_eq!(page["has_more"], next.is_some());
            match next {
                Some(next) => cursor = format!("&cursor={next}"),
                None => return rows,
            }
        }
    }

    /// The end of every test: each sale is audited, then the application stops in order.
    pub(crate) async fn finish(mut self) {
        for sale in self.pages("/v1/sales").await {
            let audit = self.audit(id(&sale)).await;
            assert_eq!(audit["verdict"], "pass", "{audit:#}");
        }
        self.stop().await;
        self.audited = true;
    }

    /// The end of a test that took something from Redis which only a rebuild could bring back: no
    /// audit can pass any more.
    pub(crate) async fn abandon(mut self) {
        self.stop().await;
        self.audited = true;
    }
}

impl Drop for App {
    fn drop(&mut self) {
        assert!(
            self.audited || std::thread::panicking(),
            "a test must end with App::finish or App::abandon"
        );
    }
}

/// Sends a request and reads its answer.
pub(crate) async fn send(request: RequestBuilder) -> Answer {
    try_send(request).await.unwrap()
}

/// Sends a request and reads its answer. An error says that there was none: what has begun must
/// come to its end.
pub(crate) async fn try_send(request: RequestBuilder) -> reqwest::Result<Answer> {
    let response = request.send().await?;
    let (status, headers) = (response.status(), response.headers().clone());
    let text = response.text().await.unwrap();
    Ok(Answer {
        status,
        headers,
        text,
    })
}

/// Sends the same request until there is a definite answer, as a good client does: at another door
/// after each 503, and after each connection that is refused or broken.
pub(crate) async fn insist(request: RequestBuilder, doors: &[watch::Receiver<String>]) -> Answer {
    let asking = async {
        let mut doors = doors.iter().cycle();
        loop {
            let url = doors.next().unwrap().borrow().clone();
            let attempt = redirected(request.try_clone().unwrap(), &url);
            if let Ok(answer) = try_send(attempt).await
                && answer.status != 503
            {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, asking).await.unwrap()
}

/// Sends all requests at once.
pub(crate) async fn crowd(requests: impl IntoIterator<Item = RequestBuilder>) -> Vec<Answer> {
    let sending: JoinSet<_> = requests.into_iter().map(send).collect();
    sending.join_all().await
}

/// The `id` of a JSON object.
pub(crate) fn id(value: &Value) -> &str {
    value["id"].as_str().unwrap()
}

/// The address of the database, for a test's own questions.
pub(crate) async fn sql(app: &App) -> sqlx::PgConnection {
    use sqlx::Connection;
    sqlx::PgConnection::connect(app.database_url.expose_secret())
        .await
        .unwrap()
}
