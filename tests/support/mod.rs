//! What the tests share: real services, started for them.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::process::{Child, Command, Stdio};

use stockade::{
    domain::id::{Epoch, Partition},
    engine::{Engine, EngineMeter, EngineOptions, RedisUrl},
};
use tempfile::TempDir;

/// A Redis of one's own.
pub(crate) struct Redis {
    pub(crate) url: String,
    child: Child,
    _dir: TempDir,
}

impl Redis {
    pub(crate) async fn start() -> Self {
        let dir = TempDir::new().unwrap();
        let port = std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let child = Command::new("redis-server")
            .args([
                "--port",
                &port.to_string(),
                "--bind",
                "127.0.0.1",
                "--appendonly",
                "yes",
            ])
            .args([
                "--appendfsync",
                "always",
                "--save",
                "",
                "--maxmemory-policy",
                "noeviction",
            ])
            .arg("--dir")
            .arg(dir.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        while tokio::net::TcpStream::connect(("127.0.0.1", port))
            .await
            .is_err()
        {
            tokio::task::yield_now().await;
        }
        Self {
            url: format!("redis://127.0.0.1:{port}"),
            child,
            _dir: dir,
        }
    }
}

impl Redis {
    /// Ends it; the second time does nothing.
    pub(crate) fn stop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.stop();
    }
}

/// An engine on a fresh partition, in its first epoch.
pub(crate) async fn engine(redis: &Redis, partition: Partition) -> Engine {
    let options = EngineOptions {
        url: RedisUrl(redis.url.clone().into()),
        queue_capacity: 16_384,
    };
    let engine = Engine::connect(&options, partition, EngineMeter::default())
        .await
        .unwrap();
    let inspection = engine.inspect().await.unwrap();
    engine.install(Epoch(1), &inspection).await.unwrap();
    engine
}
