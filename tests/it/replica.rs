//! A primary, a replica, and who takes over when the primary is gone.

use rustix::process::Signal;
use secrecy::{ExposeSecret, SecretString};
use stockade::embedded::RedisOptions;

use super::{
    faults::{Crowd, assert_not_applied, assert_sold, drop_of, lock_orders, until_fenced},
    selling::{rows, stored, strangers},
    support::{
        Redis,
        app::{App, PATIENCE, crowd},
        link::Link,
        wire::Wire,
    },
};

/// A primary behind a link, with a replica that follows it over another.
pub(crate) struct Pair {
    pub(crate) app: App,
    pub(crate) replica: Redis,
    /// Between the application and whoever is primary.
    pub(crate) door: Link,
    /// Between the primary and the replica.
    pub(crate) cable: Link,
}

impl Pair {
    async fn start() -> Self {
        let mut pair = Self::without_node(&[]).await;
        pair.app.run().await;
        pair
    }

    /// Both servers, and an application that does not run yet.
    pub(crate) async fn without_node(settings: &[(&str, &str)]) -> Self {
        let password = SecretString::from("the password of both");
        let with = |options: &mut RedisOptions| {
            options.password = SecretString::from(password.expose_secret().replace(' ', "_"));
            let secret = options.password.expose_secret().to_owned();
            options.settings.push(("masterauth".to_owned(), secret));
        };
        let (mut primary, replica) = (Redis::start_with(with).await, Redis::start_with(with).await);
        let door = Link::to(primary.server.port()).await;
        let cable = Link::to(primary.server.port()).await;
        primary.address = door.address(primary.server.url());
        let follow = cable.port.to_string();
        let mut wire = Wire::to(replica.server.url().expose_secret()).await;
        wire.run(&["REPLICAOF", "127.0.0.1", &follow]).await;
        until_info(&mut wire, "master_link_status:up").await;
        let app = App::on(primary, settings).await;
        Self {
            app,
            replica,
            door,
            cable,
        }
    }

    pub(crate) async fn at_replica(&self) -> Wire {
        Wire::to(self.replica.server.url().expose_secret()).await
    }

    /// Waits until the replica has all that the primary has.
    async fn in_step(&self) {
        let mut primary = Wire::connect(&self.app.redis).await;
        assert_eq!(primary.run(&["WAIT", "1", "10000"]).await, "1");
    }

    /// Makes the replica the primary, and leads the application to it.
    pub(crate) async fn promote(&self) {
        self.cable.cut();
        let mut wire = self.at_replica().await;
        wire.run(&["REPLICAOF", "NO", "ONE"]).await;
        self.door.lead_to(self.replica.server.port());
        self.door.cut();
    }
}

/// Waits until `INFO replication` says so.
pub(crate) async fn until_info(wire: &mut Wire, line: &str) {
    let asking = async {
        while !wire.ask(&["INFO", "replication"]).await[0].contains(line) {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, asking).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_was_behind_sells_nothing() {
    let pair = Pair::start().await;
    let app = &pair.app;
    let sale = drop_of(app, 40).await;
    for answer in crowd(strangers(app, &sale, 10)).await {
        answer.expect(201);
    }
    pair.in_step().await;
    stored(app, &sale).await;
    pair.cable.stall();
    // What PostgreSQL has is no loss, and would be made anew: nothing of this is stored.
    let lock = lock_orders(app, "SHARE").await;
    for answer in crowd(strangers(app, &sale, 20)).await {
        answer.expect(201);
    }
    app.redis.server.kill().await;
    pair.promote().await;
    let seq = pair
        .at_replica()
        .await
        .ask(&["HGET", "{p0}:round:1.1", "seq"])
        .await;
    assert_eq!(seq, ["10"], "the replica was not behind");
    until_fenced(app).await;
    for answer in crowd(strangers(app, &sale, 50)).await {
        assert_not_applied(&answer);
    }
    assert_eq!(rows(app, &sale).await.len(), 10);
    drop(lock);
    pair.app.abandon().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_planned_failover_loses_and_doubles_nothing() {
    let pair = Pair::start().await;
    let app = &pair.app;
    let sale = drop_of(app, 150).await;
    let mut crowd = Crowd::send(strangers(app, &sale, 300), vec![app.door()]);
    crowd.served(30).await;
    let mut primary = Wire::connect(&app.redis).await;
    assert_eq!(primary.run(&["FAILOVER"]).await, "OK");
    until_info(&mut pair.at_replica().await, "role:master").await;
    assert!(*crowd.served.borrow() < 300, "too late to be in the middle");
    // Connections that there are stay at the old primary, which refuses: nobody may stay stuck.
    pair.door.lead_to(pair.replica.server.port());
    let answers = crowd.done().await;
    assert_sold(app, &sale, &answers, 150).await;
    pair.app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_primary_that_comes_back_keeps_nothing() {
    let pair = Pair::start().await;
    let app = &pair.app;
    let sale = drop_of(app, 60).await;
    let mut answers = crowd(strangers(app, &sale, 10)).await;
    pair.in_step().await;
    app.redis.server.signal(Signal::STOP);
    pair.promote().await;
    // What PostgreSQL has would be given to the old one, too: nothing of this is stored.
    stored(app, &sale).await;
    let lock = lock_orders(app, "SHARE").await;
    answers.extend(
        Crowd::send(strangers(app, &sale, 10), vec![app.door()])
            .done()
            .await,
    );
    app.redis.server.signal(Signal::CONT);
    // The application is led back to it, as by an address that flaps.
    pair.door.lead_to(app.redis.server.port());
    pair.door.cut();
    for answer in crowd(strangers(app, &sale, 20)).await {
        super::selling::refused(&answer, 503, "unavailable");
    }
    until_fenced(app).await;
    for answer in crowd(strangers(app, &sale, 20)).await {
        assert_not_applied(&answer);
    }
    pair.door.lead_to(pair.replica.server.port());
    pair.door.cut();
    drop(lock);
    answers.extend(
        Crowd::send(strangers(app, &sale, 60), vec![app.door()])
            .done()
            .await,
    );
    assert_sold(app, &sale, &answers, 60).await;
    pair.app.finish().await;
}
