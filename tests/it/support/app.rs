//! A whole application on stores of its own, spoken to over HTTP.

use std::time::Duration;

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
    lifecycle::Lifecycle,
};
use tokio::task::JoinHandle;
use uuid::Uuid;

use super::Redis;

pub(crate) const SECRET: &str = "a secret of the tests, 32 bytes!";

/// How long anything may take that must happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// An application, its stores, and what is needed to speak to it.
pub(crate) struct App {
    pub(crate) redis: Redis,
    pub(crate) database_url: SecretString,
    pub(crate) client: Client,
    pub(crate) url: String,
    pub(crate) operator: Uuid,
    settings: Vec<(String, String)>,
    life: Lifecycle,
    running: Option<JoinHandle<()>>,
    keys: TokenKeys,
    audited: bool,
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
        let (redis, database_url) = tokio::join!(Redis::start(), super::database());
        let keys = [Secret {
            id: "1",
            bytes: SECRET.as_bytes(),
        }];
        let mut app = Self {
            redis,
            database_url,
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
            life: Lifecycle::new(),
            running: None,
            keys: TokenKeys::new(&keys, 600).unwrap(),
            audited: false,
        };
        app.run().await;
        app
    }

    /// Starts the application on its stores, and waits until it is ready.
    pub(crate) async fn run(&mut self) {
        let mut vars = vec![
            ("STOCKADE_HTTP_ADDR".to_owned(), "127.0.0.1:0".to_owned()),
            ("STOCKADE_JWT_SECRET".to_owned(), SECRET.to_owned()),
        ];
        vars.extend(self.settings.iter().cloned());
        let config = Config::load(vars).unwrap();
        let endpoints = Endpoints {
            redis_url: self.redis.server.url().clone(),
            cache_redis_url: None,
            database_url: self.database_url.clone(),
        };
        self.life = Lifecycle::new();
        let started = app::start(&config, &endpoints, Role::ALL, &self.life)
            .await
            .unwrap();
        self.url = format!("http://{}", started.http_addr.unwrap());
        let life = self.life.clone();
        self.running = Some(tokio::spawn(async move { life.run().await.unwrap() }));
        self.ready().await;
    }

    /// Waits until the application wants traffic.
    pub(crate) async fn ready(&self) {
        self.until("/readyz", |answer| answer.status == 200).await;
    }

    /// Stops the application as SIGTERM does, and waits until its last task has ended.
    pub(crate) async fn stop(&mut self) {
        self.life.stop();
        if let Some(running) = self.running.take() {
            running.await.unwrap();
        }
    }

    /// An access token.
    pub(crate) fn token(&self, user: Uuid, role: auth::Role) -> String {
        let identity = Identity {
            user,
            role,
            session: None,
        };
        self.keys
            .mint(identity, clock::new_id(), clock::now())
            .unwrap()
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
        let asking = async {
            loop {
                let answer = send(self.operate(Method::GET, path)).await;
                if wanted(&answer) {
                    return answer;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(PATIENCE, asking)
            .await
            .unwrap_or_else(|_| panic!("{path}: too late"))
    }

    /// The audit of one sale, once everything is stored.
    pub(crate) async fn audit(&self, sale: &str) -> Value {
        let path = format!("/v1/sales/{sale}/audit");
        let done =
            |answer: &Answer| answer.status == 200 && answer.json()["verdict"] != json!("pending");
        self.until(&path, done).await.json()
    }

    /// The end of every test: each sale is audited, then the application stops in order.
    pub(crate) async fn finish(mut self) {
        let mut cursor = String::new();
        loop {
            let page = self
                .get(&format!("/v1/sales?limit=100{cursor}"))
                .await
                .expect(200)
                .json();
            for sale in page["data"].as_array().unwrap() {
                let audit = self.audit(sale["id"].as_str().unwrap()).await;
                assert_eq!(audit["verdict"], "pass", "{audit:#}");
            }
            match page["next_cursor"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => break,
            }
        }
        self.stop().await;
        self.audited = true;
    }
}

impl Drop for App {
    fn drop(&mut self) {
        assert!(
            self.audited || std::thread::panicking(),
            "a test must end with App::finish"
        );
    }
}

/// Sends a request and reads its answer.
pub(crate) async fn send(request: RequestBuilder) -> Answer {
    let response = request.send().await.unwrap();
    let (status, headers) = (response.status(), response.headers().clone());
    let text = response.text().await.unwrap();
    Answer {
        status,
        headers,
        text,
    }
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
