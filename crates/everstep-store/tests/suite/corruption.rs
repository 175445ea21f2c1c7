//! A thousand seeded corruptions of a store that the real code has written: each is found, named and survived.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use everstep_store::{CheckpointManifest, Damage};

use crate::support::{Fixture, checkpoint};

const CORRUPTIONS: usize = 1000;

/// SplitMix64: the same corruptions every time.
struct Draw(u64);

impl Draw {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Corruption {
    Flip,
    Truncate,
    Remove,
}

#[tokio::test]
async fn a_thousand_corruptions_are_found_named_and_survived() {
    let dir = tempfile::tempdir().unwrap();
    let fixture = Fixture::file(dir.path());
    let store = fixture.run("r").await;
    let mut manifests: Vec<CheckpointManifest> = Vec::new();
    for step in [10, 20, 30, 40] {
        manifests.push(checkpoint(&store, step).await);
    }
    // The victims are the two newest; what is older is what to fall back to.
    let mut objects: Vec<(usize, String)> = Vec::new();
    for (at, manifest) in manifests.iter().enumerate().skip(2) {
        objects.push((at, format!("checkpoints/{}/MANIFEST.json", manifest.step)));
        objects.extend(manifest.objects.iter().map(|o| (at, o.key.clone())));
    }

    let mut draw = Draw(4);
    let mut counts: BTreeMap<(Corruption, bool), usize> = BTreeMap::new();
    for number in 0..CORRUPTIONS {
        let (at, key) = objects[draw.below(objects.len())].clone();
        let path: PathBuf = dir.path().join("r").join(&key);
        let intact = fs::read(&path).unwrap();
        let corruption = match draw.below(10) {
            0 => Corruption::Remove,
            1..4 => Corruption::Truncate,
            _ => Corruption::Flip,
        };
        match corruption {
            Corruption::Flip => {
                let mut bytes = intact.clone();
                let byte = draw.below(bytes.len());
                bytes[byte] ^= 1 + draw.below(255) as u8;
                fs::write(&path, bytes).unwrap();
            }
            Corruption::Truncate => {
                fs::write(&path, &intact[..draw.below(intact.len())]).unwrap();
            }
            Corruption::Remove => fs::remove_file(&path).unwrap(),
        }
        let context = format!("corruption {number}: {corruption:?} of {key}");

        // Found, and named by its key.
        let step = manifests[at].step;
        let found: Vec<Damage> = store.verify(step).await.unwrap();
        let named: Vec<&str> = found.iter().map(|damage| damage.object.as_str()).collect();
        assert_eq!(named, [key.as_str()], "{context}");
        for line in found.iter().map(Damage::to_string) {
            assert!(line.contains(&key) && !line.contains('\n'), "{line}");
        }
        // Slowly as well, unless there is nothing to read: a step without a manifest is none.
        let is_manifest = key.ends_with("MANIFEST.json");
        if !(is_manifest && corruption == Corruption::Remove) {
            let scrubbed = store.scrub(step, u64::MAX).await.unwrap().damage;
            assert_eq!(scrubbed, found, "{context}");
        }

        // Survived: the newest checkpoint if another one was hit, else the one before it.
        let newest = store.latest_intact(&[]).await.unwrap();
        let expected = if at == 3 {
            &manifests[2]
        } else {
            &manifests[3]
        };
        assert_eq!(newest.checkpoint.as_ref(), Some(expected), "{context}");

        fs::write(&path, &intact).unwrap();
        *counts.entry((corruption, is_manifest)).or_default() += 1;
    }
    println!("{counts:?}");
    // All kinds happened, to manifests and to other objects.
    assert_eq!(counts.values().sum::<usize>(), CORRUPTIONS);
    assert_eq!(counts.len(), 6);
    assert!(counts.values().all(|count| *count >= 20), "{counts:?}");
    for manifest in &manifests {
        assert_eq!(store.verify(manifest.step).await.unwrap(), []);
    }
}
