//! From a URL to an object store: one file for each kind.
//!
//! object_store's clients are built here without their default TLS: the HTTP client (reqwest with `rustls-no-provider`) takes the
//! process's default rustls provider, and requests are signed by object_store's `ring` feature. So ring is installed as rustls's
//! provider before the first client is built, unless the program has chosen one.

mod azure;
mod file;
mod google;
mod s3;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzure, MicrosoftAzureBuilder};
use object_store::client::ClientConfigKey;
use object_store::gcp::{GoogleCloudStorage, GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use object_store::{BackoffConfig, ObjectStore, RetryConfig};
use url::Url;

use crate::error::{StoreError, one_line};

/// Longest time of a request that moves blocks: 40 MiB on their way at 10 Mbit/s.
const BULK_TIMEOUT: &str = "45 seconds";
/// Longest time of any other request.
const SMALL_TIMEOUT: &str = "5 seconds";
/// Longest time until a server is reached.
const CONNECT_TIMEOUT: &str = "3 seconds";

/// One store, seen from inside one run's folder.
#[derive(Clone)]
pub(crate) struct Backend {
    /// For blocks: a request may move megabytes over a slow link.
    pub(crate) bulk: Arc<dyn ObjectStore>,
    /// For documents, sizes and lists: what takes longer than seconds will not come.
    pub(crate) small: Arc<dyn ObjectStore>,
    /// The run's folder, for `file://` only.
    pub(crate) folder: Option<PathBuf>,
    /// What is probably the cause if the store refuses us.
    pub(crate) suspicion: Option<&'static str>,
}

/// Opens `url` for `run`; `options` are settings (`AWS_ENDPOINT_URL`, …) that override the environment.
pub(crate) fn open(
    url: &str,
    run: &str,
    options: &BTreeMap<String, String>,
) -> Result<Backend, StoreError> {
    let bad = |reason: String| StoreError::BadUrl {
        url: url.to_owned(),
        reason,
    };
    let parsed = Url::parse(url).map_err(|error| bad(format!("{error}; allowed are {FORMS}")))?;
    if parsed.query().is_some() || parsed.fragment().is_some() {
        return Err(bad(
            "`?` and `#` are not allowed, settings come from the environment".to_owned(),
        ));
    }
    let open_bucket = match parsed.scheme() {
        "file" => return file::open(url, &parsed, run),
        "s3" => s3::open,
        "gs" => google::open,
        "az" => azure::open,
        scheme => {
            return Err(StoreError::UnknownScheme {
                url: url.to_owned(),
                scheme: scheme.to_owned(),
            });
        }
    };
    let place = Place::of(&parsed, run).map_err(bad)?;
    // An error only says that the program has chosen a provider already, which is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    open_bucket(place, options).map_err(bad)
}

/// How a store's URL may look.
pub(crate) const FORMS: &str =
    "`file:///folder`, `s3://bucket/prefix`, `gs://bucket/prefix` and `az://container/prefix`";

/// Where in a cloud's store a run lies.
struct Place {
    bucket: String,
    prefix: Path,
}

impl Place {
    fn of(url: &Url, run: &str) -> Result<Self, String> {
        let scheme = url.scheme();
        if !url.username().is_empty() || url.password().is_some() || url.port().is_some() {
            return Err(
                "credentials and ports do not belong here, they come from the environment"
                    .to_owned(),
            );
        }
        let bucket = url.host_str().filter(|bucket| !bucket.is_empty());
        Ok(Self {
            bucket: bucket
                .ok_or_else(|| format!("the bucket is missing, write `{scheme}://bucket/prefix`"))?
                .to_owned(),
            prefix: Path::from_url_path(url.path())
                .map_err(|error| error.to_string())?
                .join(run),
        })
    }

    /// The run's folder, through two clients that differ in how long they wait.
    ///
    /// Bare containers have no CA certificates, without which no client can be built. A plain `http://` endpoint needs none, so there the
    /// client is built with an empty set, which trusts nobody.
    fn backend<S: Service>(
        &self,
        service: &S,
        plain_http: bool,
        suspicion: Option<&'static str>,
    ) -> Result<Backend, String> {
        let client = |timeout| -> Result<Arc<dyn ObjectStore>, String> {
            let client = service
                .clone()
                .with_client(ClientConfigKey::ConnectTimeout, CONNECT_TIMEOUT)
                .with_client(ClientConfigKey::Timeout, timeout);
            let mut store = client.clone().build();
            if store.is_err() && plain_http {
                let key = ClientConfigKey::NoSystemCertificates;
                store = client.with_client(key, "true").build();
            }
            let store = store.map_err(|error| one_line(&error))?;
            Ok(Arc::new(PrefixStore::new(store, self.prefix.clone())))
        };
        Ok(Backend {
            bulk: client(BULK_TIMEOUT)?,
            small: client(SMALL_TIMEOUT)?,
            folder: None,
            suspicion,
        })
    }
}

/// What the builders of object_store's clients have in common.
trait Service: Clone {
    type Store: ObjectStore;

    /// The same with settings by their names in the environment.
    fn with_options(self, options: &BTreeMap<String, String>) -> Result<Self, String>;
    fn with_client(self, key: ClientConfigKey, value: &str) -> Self;
    fn build(self) -> object_store::Result<Self::Store>;
}

/// [`Service`] for a builder, its type of keys and its store, whose settings begin with `$family`.
macro_rules! service {
    ($builder:ty, $key:ident, $store:ty, $family:literal) => {
        impl Service for $builder {
            type Store = $store;

            fn with_options(mut self, options: &BTreeMap<String, String>) -> Result<Self, String> {
                for (name, value) in options {
                    let key: $key = name.to_ascii_lowercase().parse().map_err(|_| {
                        format!(
                            "setting `{name}` is unknown, allowed are the {}_* names of object_store",
                            $family
                        )
                    })?;
                    self = self.with_config(key, value);
                }
                Ok(self)
            }

            fn with_client(self, key: ClientConfigKey, value: &str) -> Self {
                self.with_config($key::Client(key), value)
            }

            fn build(self) -> object_store::Result<Self::Store> {
                self.with_retry(retries()).build()
            }
        }
    };
}

service!(AmazonS3Builder, AmazonS3ConfigKey, AmazonS3, "AWS");
service!(
    MicrosoftAzureBuilder,
    AzureConfigKey,
    MicrosoftAzure,
    "AZURE"
);
service!(
    GoogleCloudStorageBuilder,
    GoogleConfigKey,
    GoogleCloudStorage,
    "GOOGLE"
);

/// A request that failed is repeated a few times at once, with jitter. An outage is the caller's to bridge: it knows what else
/// can be done meanwhile, and says so.
fn retries() -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig {
            init_backoff: Duration::from_millis(100),
            max_backoff: Duration::from_secs(2),
            base: 2.0,
        },
        max_retries: 4,
        retry_timeout: Duration::from_secs(6),
    }
}
